"""Real data sets in their published formats."""

import pytest
from byte_tokenizer import SHARED

from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.data.prompts import PromptData
from lit_align.data.sources import Source, load_rows


def test_gsm8k_prompts(shared_data, chat_path):
    module = PromptData(
        str(shared_data / "gsm8k_train.jsonl"),
        eval_path=str(shared_data / "gsm8k_test.jsonl"),
        rename_columns={"question": "prompt"},
        tokenizer=chat_path,
        max_rows=200,
    )
    batch = next(iter(module.val_dataloader()))
    assert batch.columns["prompt"] == batch.columns["question"]
    assert "#### 18" in batch.columns["answer"][0]
    assert module.decode(batch.prompts[0].tolist()[-batch.prompt_lengths[0] :]).startswith("Janet")


def test_sharegpt_preference_pairs(shared_data, chat_path):
    path = str(shared_data / "llamafactory_dpo_en_demo.json")
    module = PreferenceData(path, eval_path=path, tokenizer=chat_path, max_tokens=9000)
    batch = next(iter(module.val_dataloader()))
    text = module.tokenizer.decode(batch.chosen[0][: batch.chosen_lengths[0]])
    assert text.startswith("<|im_start|>user\nHi! I'd like to create a new language game")
    assert text.endswith("<|im_end|>")
    response = module.tokenizer.decode(batch.chosen[0][batch.chosen_target_mask[0]])
    assert response.startswith("That sounds like a fun and engaging idea!")
    total = sum(module.dropped.values()) + len(next(iter(module.encoded.values())))
    assert total == 300


def test_alpaca(shared_data, chat_path):
    path = str(shared_data / "llamafactory_alpaca_en_demo.json")
    module = InstructionData(path, eval_path=path, tokenizer=chat_path, max_rows=50)
    batch = next(iter(module.val_dataloader()))
    target = module.tokenizer.decode(batch.tokens[0][batch.target_mask[0]])
    assert target.startswith("Making crepes is an easy")


def test_parquet_with_messages_as_prompts(shared_data, chat_path):
    path = str(shared_data / "digit_completion_train.parquet")
    module = PromptData(path, tokenizer=chat_path, batch_size=800)
    (batch,) = module.train_dataloader()
    assert batch.columns["prompt"][0][0]["role"] == "user"
    assert len(batch) == 800


def test_stories_with_single_newline_as_separator(shared_data):
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip("the shared real model is not here")
    path = str(shared_data / "tinystories_lower_4MB.txt")
    stories = load_rows(path, separator=r"(?<!\n)\n(?!\n)")
    assert len(stories) > 5500
    assert stories[1]["text"].startswith("once upon a time, there was a little car named beep.")
    assert stories[1]["text"].endswith("beep lived happily ever after.")
    module = InstructionData(
        [Source(path, separator=r"(?<!\n)\n(?!\n)")],
        tokenizer=str(SHARED / "models" / "stories260K"),
        max_rows=20,
        max_tokens=512,
    )
    batch = next(iter(module.train_dataloader()))
    assert module.decode(batch.tokens[0].tolist()).strip()
    assert batch.tokens.shape[1] <= 512

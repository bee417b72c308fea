"""Prompts: left padding, columns, limits."""

import json

import pytest

from lit_align.batches import Experience
from lit_align.data.prompts import PromptData


@pytest.fixture
def rows(tmp_path):
    def write(*rows) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


def only_batch(module) -> Experience:
    return next(iter(module.val_dataloader()))


def test_prompts_are_padded_in_front(rows, chat_path):
    path = rows({"prompt": "ab", "level": 1}, {"prompt": "abcd", "level": 2})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    batch, pad = only_batch(module), module.tokenizer.pad_token_id
    a, b, c, d = module.tokenizer("abcd")["input_ids"]
    assert batch.prompts.tolist() == [[pad, pad, a, b], [a, b, c, d]]
    assert batch.prompt_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert batch.prompt_lengths == [2, 4]
    assert batch.columns == {"prompt": ["ab", "abcd"], "level": [1, 2]}


def test_the_mask_keeps_a_pad_id_that_is_a_real_token(rows, chat_path):
    path = rows({"prompt": "a<|eos|>"}, {"prompt": "abc"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id
    assert only_batch(module).prompt_mask.tolist() == [[False, True, True], [True] * 3]


def test_columns_are_as_the_data_set_has_them(rows, chat_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = rows({"messages": messages, "answer": None})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    batch = only_batch(module)
    assert batch.columns == {"messages": [messages], "answer": [None], "prompt": [messages[:1]]}
    text = module.tokenizer.decode(batch.prompts[0])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts_are_dropped_or_keep_their_end(rows, chat_path):
    path = rows({"prompt": "abcd"}, {"prompt": "ab"})
    drops = PromptData(path, eval_path=path, tokenizer=chat_path, max_prompt_tokens=3)
    assert only_batch(drops).columns["prompt"] == ["ab"]
    reason = "prompts of more than max_prompt_tokens 3"
    assert (drops.dropped, drops.truncated) == ({reason: 1}, {})
    cuts = PromptData(
        path, eval_path=path, tokenizer=chat_path, max_prompt_tokens=3, truncate_prompts=True
    )
    batch = only_batch(cuts)
    assert [cuts.decode(row.tolist()) for row in batch.prompts] == ["bcd", "ab"]
    assert (cuts.dropped, cuts.truncated) == ({}, {reason: 1})


def test_drops_are_said_once(rows, chat_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_align.data.base.rank_zero_info", said.append)
    path = rows({"prompt": "abcd"}, {"prompt": "ab"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, max_prompt_tokens=3)
    only_batch(module)
    only_batch(module)
    end = "(train, 2 rows): dropped 1 prompts of more than max_prompt_tokens 3"
    assert said == [f"'{path}' {end}"]


def test_conversations_without_a_template(rows):
    path = rows({"prompt": [{"role": "user", "content": "hi"}]})
    module = PromptData(path, eval_path=path, tokenizer="toy")
    with pytest.raises(ValueError, match=r"^row 0 of .*no chat template: set data\.chat_template"):
        module.val_dataloader()


def test_the_first_words_of_a_text_are_a_prompt(rows, chat_path):
    path = rows({"text": "  once upon\n a time, ago"}, {"text": "too short"}, {"text": "a b c "})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, prompt_words=3)
    batch = only_batch(module)
    assert batch.columns["prompt"] == ["once upon\n a"]
    assert batch.columns["text"] == ["  once upon\n a time, ago"]
    assert module.dropped == {"texts of at most prompt_words 3": 2}


def test_first_words_need_a_text(rows, chat_path):
    path = rows({"story": "a b"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, prompt_words=1)
    with pytest.raises(
        ValueError, match=r"wanted: text, of which data\.prompt_words makes prompts"
    ):
        module.val_dataloader()


def test_the_same_prompt_is_never_trained_on_and_evaluated(rows, chat_path):
    path = rows(*({"prompt": f"p{number % 10}", "level": number} for number in range(50)))
    module = PromptData(path, tokenizer=chat_path, eval_fraction=0.2, batch_size=1)
    trained = {batch.columns["prompt"][0] for batch in module.train_dataloader()}
    held_out = [batch.columns["prompt"][0] for batch in module.val_dataloader()]
    assert len(trained) == 8
    assert len(held_out) == 10
    assert trained.isdisjoint(held_out)


@pytest.mark.parametrize("paths", [{"path": "no.jsonl"}, {"path": "toy", "eval_path": "no.jsonl"}])
def test_files_that_are_not_there_are_refused_before_a_model_is_loaded(paths):
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'no.jsonl'"):
        PromptData(**paths, tokenizer="toy").setup("fit")

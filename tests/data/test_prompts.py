"""Prompts: left padding, columns, limits."""

import json

import pytest

from lit_align.batches import Experience
from lit_align.data.prompts import PromptData
from lit_align.errors import UserError


@pytest.fixture
def rows(tmp_path):
    def write(*rows) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


def only_batch(module) -> Experience:
    return next(iter(module.val_dataloader()))


def test_prompts_are_left_padded(rows, chat_path):
    path = rows({"prompt": "ab", "level": 1}, {"prompt": "abcd", "level": 2})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    batch, pad = only_batch(module), module.tokenizer.pad_token_id
    a, b, c, d = module.tokenizer("abcd")["input_ids"]
    assert batch.prompts.tolist() == [[pad, pad, a, b], [a, b, c, d]]
    assert batch.prompt_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert batch.prompt_lengths == [2, 4]
    assert batch.columns == {"prompt": ["ab", "abcd"], "level": [1, 2]}


def test_mask_keeps_real_token_with_pad_id(rows, chat_path):
    path = rows({"prompt": "a<|eos|>"}, {"prompt": "abc"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id
    assert only_batch(module).prompt_mask.tolist() == [[False, True, True], [True] * 3]


def test_columns_of_data_set_are_kept(rows, chat_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = rows({"messages": messages, "answer": None})
    module = PromptData(path, eval_path=path, tokenizer=chat_path)
    batch = only_batch(module)
    assert batch.columns == {"messages": [messages], "answer": [None], "prompt": [messages[:1]]}
    text = module.tokenizer.decode(batch.prompts[0])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts_are_dropped_or_cut_in_front(rows, chat_path):
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


def test_dropped_rows_are_logged_once(rows, chat_path, monkeypatch):
    logged = []
    monkeypatch.setattr("lit_align.data.base.rank_zero_info", logged.append)
    path = rows({"prompt": "abcd"}, {"prompt": "ab"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, max_prompt_tokens=3)
    only_batch(module)
    only_batch(module)
    end = "(train, 2 rows): dropped 1 prompts of more than max_prompt_tokens 3"
    assert logged == [f"'{path}' {end}"]


def test_conversation_without_template_is_refused(rows):
    path = rows({"prompt": [{"role": "user", "content": "hi"}]})
    module = PromptData(path, eval_path=path, tokenizer="toy")
    with pytest.raises(
        ValueError, match=r"^row 0 of .*no chat template\. Set --data\.chat_template"
    ):
        module.val_dataloader()


def test_first_words_of_text_are_prompt(rows, chat_path):
    path = rows({"text": "  once upon\n a time, ago"}, {"text": "too short"}, {"text": "a b c "})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, prompt_words=3)
    batch = only_batch(module)
    assert batch.columns["prompt"] == ["once upon\n a"]
    assert batch.columns["text"] == ["  once upon\n a time, ago"]
    assert module.dropped == {"texts of at most prompt_words 3": 2}


def test_prompt_words_need_text_column(rows, chat_path):
    path = rows({"story": "a b"})
    module = PromptData(path, eval_path=path, tokenizer=chat_path, prompt_words=1)
    with pytest.raises(
        ValueError, match=r"story and needs text, because data\.prompt_words is set"
    ):
        module.val_dataloader()


def test_prompt_is_not_both_trained_on_and_evaluated(rows, chat_path):
    path = rows(*({"prompt": f"p{number % 10}", "level": number} for number in range(50)))
    module = PromptData(path, tokenizer=chat_path, eval_fraction=0.2, batch_size=1)
    trained = {batch.columns["prompt"][0] for batch in module.train_dataloader()}
    held_out = [batch.columns["prompt"][0] for batch in module.val_dataloader()]
    assert len(trained) == 8
    assert len(held_out) == 10
    assert trained.isdisjoint(held_out)


@pytest.mark.parametrize("paths", [{"path": "no.jsonl"}, {"path": "toy", "eval_path": "no.jsonl"}])
def test_missing_files_are_refused_in_setup(paths):
    with pytest.raises(UserError, match=r"no file or folder 'no.jsonl'"):
        PromptData(**paths, tokenizer="toy").setup("fit")

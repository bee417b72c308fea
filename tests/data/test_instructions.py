"""Texts for fine-tuning: target masks, padding and limits."""

import json

import pytest

from lit_align.data.instructions import InstructionData


@pytest.fixture
def texts(tmp_path, chat_path):
    def load(*rows, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = str(tmp_path / "rows.jsonl")
        module = InstructionData(path, eval_path=path, tokenizer=chat_path, **settings)
        return module, next(iter(module.val_dataloader()))

    return load


def target_texts(module, batch):
    """Return the texts of the target tokens."""
    return [
        module.tokenizer.decode(row[mask])
        for row, mask in zip(batch.tokens, batch.target_mask, strict=True)
    ]


def test_completions_are_targets_and_texts_are_right_padded(texts):
    module, batch = texts({"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcd"})
    eos = module.tokenizer.eos_token_id
    a, b, c, d = module.tokenizer("abcd")["input_ids"]
    assert batch.tokens.tolist() == [[a, b, c, eos, eos], [a, b, c, d, eos]]
    assert batch.token_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.target_mask.tolist() == [
        [False, False, True, True, False],
        [False, True, True, True, True],
    ]
    assert batch.lengths == [4, 5]
    assert batch.is_new == [True, True]


def test_train_on_prompt_makes_prompts_targets(texts):
    module, batch = texts({"prompt": "ab", "completion": "c"}, train_on_prompt=True)
    assert target_texts(module, batch) == ["abc<|eos|>"]


def test_all_tokens_of_plain_text_are_targets(texts):
    module, batch = texts({"text": "once"})
    assert target_texts(module, batch) == ["once<|eos|>"]
    assert batch.response_mask.tolist() == [[True] * 4]


def test_assistant_turns_are_targets(texts):
    talk = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "1+1?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    module, batch = texts({"conversations": talk})
    assert target_texts(module, batch) == ["2<|im_end|>yes<|im_end|>"]


def test_alpaca_rows_are_conversations(texts):
    module, batch = texts({"instruction": "add", "input": "1 1", "output": "2"})
    assert target_texts(module, batch) == ["2<|im_end|>"]
    assert module.tokenizer.decode(batch.tokens[0]).startswith(
        "<|im_start|>user\nadd\n1 1<|im_end|>"
    )


def test_messages_column_has_priority(texts):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    module, batch = texts({"prompt": "hi", "messages": talk, "text": "no"})
    assert target_texts(module, batch) == ["yes<|im_end|>"]


def test_cut_response_has_no_stop(texts):
    module, batch = texts({"prompt": "ab", "completion": "cdef"}, max_tokens=4)
    assert target_texts(module, batch) == ["cd"]
    assert module.truncated == {"texts of more than max_tokens 4": 1}


def test_texts_without_target_are_dropped(texts):
    module, batch = texts(
        {"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"}, max_tokens=4
    )
    assert target_texts(module, batch) == ["b<|eos|>"]
    assert module.dropped == {"texts without a token to train on": 1}


def test_stop_is_target_of_empty_completion(texts):
    module, batch = texts({"prompt": "a", "completion": ""})
    assert target_texts(module, batch) == ["<|eos|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"row 0 of .*columns question and needs messages"),
        ({"prompt": "", "completion": "a"}, r"row 0 of .*: the prompt is empty$"),
        ({"completion": "a"}, r"row 0 of .*columns completion and needs prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "needs an assistant turn"),
    ],
)
def test_invalid_instruction_rows_are_refused(texts, row, message):
    with pytest.raises(ValueError, match=message):
        texts(row)

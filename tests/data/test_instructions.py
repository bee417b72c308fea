"""Texts for fine-tuning: what is learnt, where they are cut."""

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


def learnt(module, batch):
    """The texts under the loss mask."""
    return [
        module.tokenizer.decode(row[mask])
        for row, mask in zip(batch.tokens, batch.target_mask, strict=True)
    ]


def test_completions_are_learnt_and_texts_padded_behind(texts):
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


def test_prompts_are_learnt_if_asked(texts):
    module, batch = texts({"prompt": "ab", "completion": "c"}, train_on_prompt=True)
    assert learnt(module, batch) == ["abc<|eos|>"]


def test_plain_texts_are_learnt_whole(texts):
    module, batch = texts({"text": "once"})
    assert learnt(module, batch) == ["once<|eos|>"]
    assert batch.response_mask.tolist() == [[True] * 4]


def test_assistant_turns_are_learnt(texts):
    talk = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "1+1?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    module, batch = texts({"conversations": talk})
    assert learnt(module, batch) == ["2<|im_end|>yes<|im_end|>"]


def test_alpaca_rows_are_conversations(texts):
    module, batch = texts({"instruction": "add", "input": "1 1", "output": "2"})
    assert learnt(module, batch) == ["2<|im_end|>"]
    assert module.tokenizer.decode(batch.tokens[0]).startswith(
        "<|im_start|>user\nadd\n1 1<|im_end|>"
    )


def test_messages_come_before_other_columns(texts):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    module, batch = texts({"prompt": "hi", "messages": talk, "text": "no"})
    assert learnt(module, batch) == ["yes<|im_end|>"]


def test_cut_answers_have_no_stop(texts):
    module, batch = texts({"prompt": "ab", "completion": "cdef"}, max_tokens=4)
    assert learnt(module, batch) == ["cd"]
    assert module.truncated == {"texts of more than max_tokens 4": 1}


def test_texts_of_which_nothing_would_be_learnt_are_dropped(texts):
    module, batch = texts(
        {"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"}, max_tokens=4
    )
    assert learnt(module, batch) == ["b<|eos|>"]
    assert module.dropped == {"texts of which no token would be learnt": 1}


def test_an_empty_completion_learns_to_stop(texts):
    module, batch = texts({"prompt": "a", "completion": ""})
    assert learnt(module, batch) == ["<|eos|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"row 0 of .*columns question; wanted: messages"),
        ({"prompt": "", "completion": "a"}, r"row 0 of .*: the prompt is empty$"),
        ({"completion": "a"}, r"row 0 of .*columns completion; wanted: prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "needs an assistant turn"),
    ],
)
def test_rows_that_cannot_be_learnt(texts, row, message):
    with pytest.raises(ValueError, match=message):
        texts(row)

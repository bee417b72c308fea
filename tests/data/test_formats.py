"""Conversion of published row formats to TRL's columns."""

import pytest

from lit_align.data.formats import add_renamed_columns, canonical_row, extract_prompt

QUESTION = {"role": "user", "content": "hi"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


def pair(row):
    row = canonical_row(row)
    return row["prompt"], row["chosen"], row["rejected"]


def test_trl_formats_are_unchanged():
    for row in (
        {"text": "a b"},
        {"prompt": "a", "completion": " b"},
        {"prompt": [QUESTION], "completion": [YES]},
        {"messages": [QUESTION, YES]},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]},
    ):
        assert canonical_row(row) == row


def test_other_columns_are_kept_and_missing_values_removed():
    assert canonical_row({"text": "a", "level": 3, "prompt": None}) == {"text": "a", "level": 3}


def test_sharegpt_conversation_becomes_messages():
    row = canonical_row(
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yes"},
            ]
        }
    )
    assert row["messages"] == [{"role": "system", "content": "be brief"}, QUESTION, YES]
    assert extract_prompt(row) == row["messages"][:2]


def test_sharegpt_preference_pairs():
    row = {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    assert pair(row) == ([QUESTION], [YES], [NO])


def test_alpaca():
    row = canonical_row({"instruction": "add", "input": "1 1", "output": "2"})
    assert row["prompt"] == [{"role": "user", "content": "add\n1 1"}]
    assert row["completion"] == [{"role": "assistant", "content": "2"}]
    row = canonical_row({"instruction": "hi", "input": "", "output": "yes"})
    assert (row["prompt"], row["completion"]) == ([QUESTION], [YES])


def test_alpaca_with_system_history_and_preferences():
    row = {
        "instruction": "and now?",
        "system": "be brief",
        "history": [["hi", "yes"]],
        "chosen": "yes",
        "rejected": "no",
    }
    prompt, chosen, rejected = pair(row)
    system, now = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "and now?"},
    )
    assert prompt == [system, QUESTION, YES, now]
    assert (chosen, rejected) == ([YES], [NO])


def test_hh_rlhf_prompt_ends_with_last_shared_assistant_turn():
    shared = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: is it late?\n\nAssistant:"
    row = {"chosen": shared + " It is noon.", "rejected": shared + " It is night."}
    assert pair(row) == (shared, " It is noon.", " It is night.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue", "The sky is bluish", ("The sky is", " blue", " bluish")),
        ("good film", "bad film", ("", "good film", "bad film")),
        ("It is so", "It is so late", ("It is", " so", " so late")),
    ],
)
def test_implicit_prompt_of_texts_ends_before_first_different_word(chosen, rejected, expected):
    assert pair({"chosen": chosen, "rejected": rejected}) == expected


def test_implicit_prompt_of_messages():
    system = {"role": "system", "content": "be brief"}
    row = {"chosen": [system, QUESTION, YES], "rejected": [system, QUESTION, NO]}
    assert pair(row) == ([system, QUESTION], [YES], [NO])
    # the prompt column repeats the first messages, as text or as messages
    assert pair({**row, "prompt": "hi"}) == ([system, QUESTION], [YES], [NO])
    assert pair({**row, "prompt": [system, QUESTION]}) == ([system, QUESTION], [YES], [NO])
    assert pair({"prompt": "hi", "chosen": [YES], "rejected": [NO]}) == ([QUESTION], [YES], [NO])


def test_last_message_is_response_if_one_conversation_starts_the_other():
    row = {"chosen": [QUESTION, YES], "rejected": [QUESTION, YES, QUESTION, NO]}
    assert pair(row) == ([QUESTION], [YES], [YES, QUESTION, NO])


def test_renaming_keeps_old_column():
    row = {"question": "1+1?", "answer": "2"}
    assert add_renamed_columns(row, {"question": "prompt"}) == {**row, "prompt": "1+1?"}
    with pytest.raises(ValueError, match="no column 'q' to rename, found question, answer"):
        add_renamed_columns(row, {"q": "prompt"})


def test_extract_prompt():
    assert extract_prompt({"prompt": "hi"}) == "hi"
    assert extract_prompt({"messages": [QUESTION, YES, QUESTION, NO]}) == [QUESTION, YES, QUESTION]
    assert extract_prompt({"messages": [QUESTION]}) == [QUESTION]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        (
            {"question": "hi", "id": 1},
            r"columns question, id and needs prompt.*Set --data\.rename_columns",
        ),
        ({"prompt": [{"role": "user"}]}, "a message needs role and content"),
        ({"messages": ["hi"]}, "a message needs role and content"),
        ({"chosen": "a", "rejected": [NO]}, "both be texts or both be messages"),
    ],
)
def test_invalid_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        extract_prompt(canonical_row(row))

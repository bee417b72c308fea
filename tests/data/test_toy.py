"""Toy film reviews: the rows of the grammar, its check and the sentiment."""

import pytest

from lit_align.data.toy import (
    all_prompts,
    is_grammatical,
    prompted_aspect,
    sentiment,
    sentiment_reward,
    toy_rows,
    toy_tokenizer,
)

PROMPT = "review of the silent river, a recent drama, on its music:"


@pytest.fixture(scope="module")
def train():
    return toy_rows("train")


@pytest.fixture(scope="module")
def test():
    return toy_rows("test")


def test_sizes_and_held_out_prompts(train, test):
    assert (len(train), len(test)) == (6000, 500)
    trained, held_out = ({row["prompt"] for row in rows} for rows in (train, test))
    assert (len(trained), len(held_out)) == (6000, 500)
    assert not trained & held_out
    assert trained | held_out <= set(all_prompts())


def test_rows_depend_only_on_seed(test):
    assert toy_rows("test") == test
    assert toy_rows("test", seed=1) != test
    assert toy_rows("test", max_rows=7) == test[:7]


def test_all_written_reviews_are_grammatical(train, test):
    for row in train + test:
        assert all(
            is_grammatical(row["prompt"], row[name])
            for name in ("completion", "chosen", "rejected")
        )


def test_decoding_returns_the_text(test):
    tokenizer = toy_tokenizer()
    assert 100 <= len(tokenizer) <= 300
    for row in test:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert 8 <= len(tokenizer(row["completion"])["input_ids"]) <= 31


@pytest.mark.parametrize(
    "review",
    [
        "haunting, but the plot feels thin.",
        "truly haunting, but the plot feels rather thin. overall a good film.",
        "grating, and the plot is thin, and the music is catchy, yet the ending seems open.",
    ],
)
def test_grammatical_reviews_are_accepted(review):
    assert is_grammatical(PROMPT, review)


@pytest.mark.parametrize(
    ("prompt", "review"),
    [
        (PROMPT, "haunting."),  # one clause
        (PROMPT, "haunting, but the plot feels thin"),  # no full stop
        (PROMPT, "wooden, but the plot feels thin."),  # acting's word
        (PROMPT, "haunting, but the sound feels thin."),
        (PROMPT, "haunting, but the plot feels thin very."),
        (PROMPT, "haunting, but the plot feels thin. overall a good drama."),
        (PROMPT, "haunting, but the plot feels thin.."),
        (PROMPT, "haunting" + ", and the plot is thin, and the music is catchy" * 2 + "."),  # five
        ("review of the music:", "haunting, but the plot feels thin."),
        (PROMPT, ""),
    ],
)
def test_other_texts_are_not_grammatical(prompt, review):
    assert not is_grammatical(prompt, review)


def test_sentiment_by_hand():
    assert sentiment("haunting, but the plot feels thin.") == (2 - 1) / 2
    assert sentiment("utterly haunting, but the plot feels slightly thin.") == (2 * 2 - 0.5) / 2
    assert sentiment("orchestral, and the plot is linear. overall a terrible film.") == -2 / 3
    assert sentiment("") == 0
    assert sentiment_reward(prompts=[PROMPT] * 2, completions=["grating.", "perfect."]) == [-2, 2]


def test_better_review_is_usually_chosen(train):
    better = [sentiment(row["chosen"]) - sentiment(row["rejected"]) for row in train]
    assert 0.8 < sum(gap > 0 for gap in better) / len(better) < 0.95
    clear = [gap for gap in better if abs(gap) > 1.5]
    assert sum(gap > 0 for gap in clear) / len(clear) > 0.98


def test_prompted_aspect_and_unknown_split():
    assert prompted_aspect(PROMPT) == "music"
    assert prompted_aspect("once upon a time") == ""
    with pytest.raises(ValueError, match="no split 'dev', found train and test"):
        toy_rows("dev")

"""Pairs of rated texts: partners, margins and held-out texts."""

import json

import pytest

from lit_align.data.rated_pairs import RatedPairs


@pytest.fixture
def module(tmp_path, chat_path):
    def load(rows, **settings):
        (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RatedPairs(str(tmp_path / "rated.jsonl"), tokenizer=chat_path, **settings)

    return load


def texts(module, batches):
    """Return (chosen, rejected, margin) of each pair as text without the stop."""

    def text(tokens, length):
        return module.decode(tokens[:length].tolist())

    return [
        (
            text(batch.chosen[i], batch.chosen_lengths[i]),
            text(batch.rejected[i], batch.rejected_lengths[i]),
            batch.margin[i].item(),
        )
        for batch in batches
        for i in range(len(batch))
    ]


LETTERS = [{"text": f"text {i}", "rating": str(i % 10)} for i in range(40)]


def test_better_rated_text_is_chosen(module):
    data = module([{"text": "good", "rating": "1.5"}, {"text": "bad", "rating": -2}], batch_size=1)
    assert texts(data, data.train_dataloader()) == [("good", "bad", 3.5)]


def test_ratings_of_pair_differ_by_min_difference(module):
    data = module(LETTERS, min_difference=6, batch_size=1)
    margins = [margin for *_, margin in texts(data, data.train_dataloader())]
    assert min(margins) == 6
    assert len(margins) >= 16  # texts rated 0 to 3 and 6 to 9 have a partner
    equal = module([{"text": str(i), "rating": 1} for i in range(4)], batch_size=1)
    with pytest.raises(ValueError, match=r"no two of 4 texts .* differ by min_difference 0"):
        equal.train_dataloader()


def test_every_text_is_paired_and_pairs_are_distinct(module):
    data = module(LETTERS, batch_size=1)
    pairs = texts(data, data.train_dataloader())
    assert {text for pair in pairs for text in pair[:2]} == {row["text"] for row in LETTERS}
    assert len(set(pairs)) == len(pairs) <= 40
    more = module(LETTERS, pairs_per_text=3, batch_size=1)
    assert 60 < len(texts(more, more.train_dataloader())) <= 120


def test_pairs_depend_on_seed(module):
    first, again, other = (
        sorted(texts(data, data.train_dataloader()))
        for data in (module(LETTERS, seed=seed, batch_size=1) for seed in (0, 0, 1))
    )
    assert first == again != other


def test_text_is_not_both_trained_on_and_evaluated(module):
    rows = LETTERS + LETTERS[:20]  # half of the texts are repeated
    data = module(rows, eval_fraction=0.25, batch_size=1)
    trained = {text for pair in texts(data, data.train_dataloader()) for text in pair[:2]}
    held_out = {text for pair in texts(data, data.val_dataloader()) for text in pair[:2]}
    assert len(trained) == 30
    assert len(held_out) == 10
    assert not trained & held_out


def test_responses_are_paired_within_prompts(module):
    rows = [
        {"prompt": f"{i}: ", "completion": f"{i}{letter}", "rating": j}
        for i in range(8)
        for j, letter in enumerate("ab")
    ]
    data = module(rows, eval_fraction=0.25, batch_size=1)
    trained, held_out = (
        texts(data, loader) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(trained) == 6
    assert len(held_out) == 2
    assert all(
        (chosen, rejected) == (f"{chosen[0]}: {chosen[0]}b", f"{chosen[0]}: {chosen[0]}a")
        for chosen, rejected, _ in trained + held_out
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.chosen_target_mask.sum().item() == batch.chosen_lengths[0] - 3


def test_long_texts_are_cut_and_counted(module):
    rows = [{"text": "a" * 20, "rating": 1}, {"text": "b", "rating": 0}]
    data = module(rows, max_tokens=8, batch_size=1)
    (batch,) = data.train_dataloader()
    assert batch.chosen_lengths == [8]
    assert data.truncated == {"texts of more than max_tokens 8": 1}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "a", "stars": 1}, {}, r"needs rating \(set by data\.rating\)"),
        (
            {"text": "a", "stars": "many"},
            {"rating": "stars"},
            "stars must be a finite number, found 'many'",
        ),
        ({"text": "a", "rating": "nan"}, {}, "rating must be a finite number, found 'nan'"),
        ({"review": "a", "rating": 1}, {}, "needs prompt and completion, or text"),
    ],
)
def test_invalid_rated_rows_are_refused(module, row, settings, message):
    with pytest.raises(ValueError, match=message):
        module([row], **settings).train_dataloader()


def test_invalid_pair_settings_are_refused(module):
    with pytest.raises(ValueError, match=r"pairs_per_text >= 1, found 0\.0 and 0"):
        module(LETTERS, pairs_per_text=0)

"""Preference pairs: padding, target masks on the responses, limits."""

import json

import pytest

from lit_align.data.preferences import PreferenceData


@pytest.fixture
def pairs(tmp_path, chat_path):
    def load(*rows, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = str(tmp_path / "rows.jsonl")
        module = PreferenceData(path, eval_path=path, tokenizer=chat_path, **settings)
        return module, next(iter(module.val_dataloader()))

    return load


def target_texts(module, batch, side):
    """Return the texts of the target tokens."""
    tokens, masks = getattr(batch, side), getattr(batch, f"{side}_target_mask")
    return [module.tokenizer.decode(row[mask]) for row, mask in zip(tokens, masks, strict=True)]


def test_both_sides_have_one_width_and_targets_on_responses(pairs):
    module, batch = pairs(
        {"prompt": "ab", "chosen": "c", "rejected": "defg"},
        {"prompt": "a", "chosen": "bc", "rejected": "d"},
    )
    assert batch.chosen.shape == batch.rejected.shape == (2, 7)
    assert (batch.chosen_lengths, batch.rejected_lengths) == ([4, 4], [7, 3])
    assert batch.chosen_mask.sum(1).tolist() == [4, 4]
    assert target_texts(module, batch, "chosen") == ["c<|eos|>", "bc<|eos|>"]
    assert target_texts(module, batch, "rejected") == ["defg<|eos|>", "d<|eos|>"]
    assert batch.margin.tolist() == [0.0, 0.0]
    assert batch.lengths == [14, 8]
    assert batch.texts().tokens.shape == (4, 7)
    assert batch.is_new == [True, True]


def test_margin_column_is_read(pairs):
    batch = pairs({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5})[1]
    assert batch.margin.tolist() == [1.5]


def test_hh_rlhf_pairs(pairs):
    shared = "\n\nHuman: hi\n\nAssistant:"
    module, batch = pairs({"chosen": shared + " yes", "rejected": shared + " no"})
    assert target_texts(module, batch, "chosen") == [" yes<|eos|>"]
    assert target_texts(module, batch, "rejected") == [" no<|eos|>"]
    assert module.tokenizer.decode(batch.chosen[0]) == shared + " yes<|eos|>"


def test_conversations_end_with_end_of_turn(pairs):
    user = {"role": "user", "content": "hi"}
    module, batch = pairs(
        {
            "chosen": [user, {"role": "assistant", "content": "yes"}],
            "rejected": [user, {"role": "assistant", "content": "no"}],
        }
    )
    assert target_texts(module, batch, "chosen") == ["yes<|im_end|>"]
    assert target_texts(module, batch, "rejected") == ["no<|im_end|>"]


def test_long_responses_are_cut_without_stop(pairs):
    module, batch = pairs({"prompt": "ab", "chosen": "cdef", "rejected": "g"}, max_tokens=4)
    assert target_texts(module, batch, "chosen") == ["cd"]
    assert target_texts(module, batch, "rejected") == ["g<|eos|>"]
    assert module.truncated == {"pairs of more than max_tokens 4": 1}


def test_equal_and_too_long_pairs_are_dropped(pairs):
    module, batch = pairs(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "abcd", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "bcde", "rejected": "bcdf"},
        max_tokens=4,
    )
    assert len(batch) == 1
    assert module.dropped == {
        "pairs of equal responses": 2,
        "prompts that fill max_tokens 4": 1,
    }


def test_pairs_without_a_prompt(pairs):
    module, batch = pairs({"chosen": "good", "rejected": "bad"})
    assert target_texts(module, batch, "chosen") == ["good<|eos|>"]
    assert target_texts(module, batch, "rejected") == ["bad<|eos|>"]


def test_missing_columns_are_named(pairs):
    with pytest.raises(ValueError, match=r"row 0 of .*columns better, worse and needs chosen and"):
        pairs({"better": "a", "worse": "b"})


def test_fingerprint_depends_only_on_texts(pairs):
    one = {"prompt": "ab", "chosen": "c", "rejected": "de"}
    swapped = {"prompt": "ab", "chosen": "de", "rejected": "c"}
    longer = {"prompt": "a", "chosen": "bc", "rejected": "bde"}
    first = pairs(one, swapped, longer)[1].fingerprints
    again = pairs(longer, {**one, "margin": 2.0}, eval_batch_size=2)[1].fingerprints
    assert len(set(first)) == 3
    assert again == [first[2], first[0]]
    assert first[0] == 6962168136751857140  # equal in every process

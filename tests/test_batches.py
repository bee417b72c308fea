"""Batches: operations on rows, trimmed padding, and micro-batches within a token budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_align.batches import Batch, Experience, PreferenceBatch, TextBatch, microbatch_indices


def two_rows() -> Experience:
    """Return two rows of 2 and 3 (of 4) prompt tokens and 1 and 2 (of 3) response tokens."""
    return Experience(
        {"prompt": ["a", "b"]},
        prompts=torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]]),
        prompt_mask=torch.tensor([[False, False, True, True], [False, True, True, True]]),
        prompt_lengths=[2, 3],
        responses=torch.tensor([[2, 0, 0], [4, 2, 0]]),
        response_mask=torch.tensor([[True, False, False], [True, True, False]]),
        response_lengths=[1, 2],
        scores=torch.tensor([1.0, 2.0]),
    )


def two_pairs() -> PreferenceBatch:
    """Return two pairs of texts of 2 and 1, and of 1 and 3 tokens; the first is the prompt."""

    def padded(*texts):
        return torch.tensor([[*text, *[0] * (4 - len(text))] for text in texts])

    chosen, rejected = padded([1, 5], [1]), padded([1], [1, 6, 7])
    return PreferenceBatch(
        chosen=chosen,
        chosen_mask=chosen > 0,
        chosen_target_mask=chosen > 1,
        chosen_lengths=[2, 1],
        rejected=rejected,
        rejected_mask=rejected > 0,
        rejected_target_mask=rejected > 1,
        rejected_lengths=[1, 3],
        margin=torch.tensor([0.0, 1.0]),
    )


def test_concat_appends_the_rows_of_the_other_batch():
    joined = two_rows().concat(two_rows().rows([1]))
    assert isinstance(joined, Experience)
    assert joined.scores.tolist() == [1.0, 2.0, 2.0]
    assert joined.response_lengths == [1, 2, 2]
    assert joined.columns == {"prompt": ["a", "b", "b"]}
    assert joined.prompts.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9], [0, 7, 8, 9]]
    assert len(two_rows().concat(two_rows().rows([]))) == 2


def test_rows_selects_from_tensors_lists_and_columns():
    selected = two_rows().rows([1, 0, 1])
    assert isinstance(selected, Experience)
    assert len(selected) == 3
    assert selected.scores.tolist() == [2.0, 1.0, 2.0]
    assert selected.response_lengths == [2, 1, 2]
    assert selected.columns == {"prompt": ["b", "a", "b"]}
    assert selected.prompts[0].tolist() == [0, 7, 8, 9]


def test_repeated_rows_are_next_to_each_other():
    assert two_rows().repeat_interleave(2).columns["prompt"] == ["a", "a", "b", "b"]


def test_replace_with_changes_a_batch_in_place():
    batch, other = two_rows(), two_rows().rows([1])
    batch.replace_with(other)
    assert len(batch) == 1
    assert batch.columns == {"prompt": ["b"]}
    batch.replace_with(Experience(scores=torch.ones(3)))
    assert list(batch.fields()) == ["scores"]


def test_a_field_that_is_not_written_does_not_exist():
    with pytest.raises(
        AttributeError, match=r"'advantages' is not written yet\. Written: columns, "
    ):
        two_rows().advantages  # noqa: B018
    assert not hasattr(two_rows(), "advantages")


def test_to_moves_tensors_and_keeps_lists_and_columns():
    moved = two_rows().to(torch.device("meta"))
    assert moved.scores.is_meta
    assert moved.response_lengths == [1, 2]
    assert moved.columns == {"prompt": ["a", "b"]}


def test_map_changes_a_copy():
    batch = Batch(scores=torch.ones(2), lengths=[1, 2])
    doubled = batch.map(lambda field: field * 2, lambda values: [value + 1 for value in values])
    assert doubled.scores.tolist() == [2, 2]
    assert doubled.lengths == [2, 3]
    assert batch.lengths == [1, 2]


def test_trim_removes_the_columns_that_are_padding_in_all_rows():
    batch = two_rows()
    trimmed = batch.trim_padding()
    assert trimmed.prompts.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert trimmed.responses.tolist() == [[2, 0], [4, 2]]
    assert trimmed.response_mask.shape == trimmed.responses.shape
    assert trimmed.scores.tolist() == [1.0, 2.0]
    assert batch.prompts.shape == (2, 4)


def test_trim_keeps_one_column_of_empty_responses():
    batch = two_rows()
    batch.response_lengths = [0, 0]
    assert batch.trim_padding().responses.shape == (2, 1)


def test_trim_distinguishes_prompts_from_responses_of_the_same_width():
    batch = two_rows()
    batch.prompts, batch.prompt_mask = batch.prompts[:, -3:], batch.prompt_mask[:, -3:]
    batch.logprobs = torch.arange(6.0).view(2, 3)
    assert batch.trim_padding().logprobs.tolist() == [[0, 1], [3, 4]]
    assert batch.trim_padding().prompts.shape == (2, 3)


def test_tokens_joins_prompt_and_response():
    batch = two_rows()
    assert batch.lengths == [3, 5]
    assert batch.tokens[1].tolist() == [0, 7, 8, 9, 4, 2, 0]
    assert batch.token_mask[1].tolist() == [False, True, True, True, True, True, False]
    assert batch.num_context_tokens == 4


def test_attention_reads_tokens_that_the_loss_mask_leaves_out():
    batch = two_rows()
    batch.response_mask = torch.zeros_like(batch.response_mask)
    assert batch.token_mask[:, 4:].tolist() == [[True, False, False], [True, True, False]]
    assert batch.loss_mask.sum() == 0


def test_the_loss_of_a_text_starts_at_its_second_token():
    batch = TextBatch(
        tokens=torch.tensor([[1, 5, 6, 0], [1, 7, 0, 0]]),
        token_mask=torch.tensor([[True, True, True, False], [True, True, False, False]]),
        target_mask=torch.tensor([[False, False, True, False], [True, True, False, False]]),
        lengths=[3, 2],
    ).trim_padding()
    assert batch.tokens.tolist() == [[1, 5, 6], [1, 7, 0]]
    assert batch.responses.tolist() == [[5, 6], [7, 0]]
    assert batch.loss_mask.tolist() == [[False, True], [True, False]]
    assert batch.num_context_tokens == 1


def test_the_texts_of_a_pair_are_next_to_each_other():
    texts = two_pairs().texts()
    assert texts.tokens.tolist() == [[1, 5, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 6, 7, 0]]
    assert texts.lengths == [2, 1, 1, 3]
    assert texts.token_mask.sum(-1).tolist() == texts.lengths
    assert texts.target_mask.sum(-1).tolist() == [1, 0, 0, 2]


def test_the_length_of_a_pair_is_twice_its_longer_text():
    pairs = two_pairs()
    assert pairs.lengths == [4, 6]
    assert pairs.loss_mask.tolist() == [True, True]
    trimmed = pairs.trim_padding()
    assert trimmed.chosen.shape == trimmed.rejected_target_mask.shape == (2, 3)
    assert trimmed.margin.tolist() == [0.0, 1.0]


def test_micro_batches_hold_rows_of_similar_length():
    # sorted: rows 1, 3, 0, 2 of 5, 4, 2, 1 tokens; padded, two of 5 fit into 10, and two of 2
    assert microbatch_indices([2, 5, 1, 4], max_tokens=10) == [[1, 3], [0, 2]]
    assert microbatch_indices([2, 5, 1, 4], max_tokens=20) == [[1, 3, 0, 2]]
    assert microbatch_indices([2, 5, 1, 4], max_tokens=3) == [[1], [3], [0], [2]]


def test_micro_batches_are_split_until_there_are_enough():
    assert microbatch_indices([1, 1, 1, 1, 1], max_tokens=9, min_microbatches=2) == [
        [0, 1, 2],
        [3, 4],
    ]
    assert microbatch_indices([1, 1, 1, 1, 1], max_tokens=9, min_microbatches=3) == [
        [0, 1],
        [2],
        [3, 4],
    ]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    max_tokens=st.integers(1, 200),
    data=st.data(),
)
def test_micro_batches_cover_each_row_once_within_the_budget(lengths, max_tokens, data):
    min_microbatches = data.draw(st.integers(1, len(lengths)))
    groups = microbatch_indices(lengths, max_tokens, min_microbatches)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert len(groups) >= min_microbatches
    for rows in groups:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= max_tokens
    fewest = len(microbatch_indices(lengths, max_tokens))
    assert len(groups) == max(fewest, min_microbatches)

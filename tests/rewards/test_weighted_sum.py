"""The weighted sum of reward functions: names, columns, weights and skipped prompts."""

import math

import pytest
import torch

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import RewardExecutor
from lit_align.rewards.weighted_sum import WeightedSum


class Fixed(RewardFunction):
    """Scores row i by the i-th number."""

    def __init__(self, *scores):
        self.scores = scores

    def __call__(self, batch):
        return [self.scores[row] for row in batch.columns["row"]]


def batch_of(rows: int) -> Experience:
    """Return rows with two responses per prompt."""
    return Experience(
        {
            "prompt": [f"prompt {row // 2}" for row in range(rows)],
            "completion": [f"completion {row}" for row in range(rows)],
            "row": list(range(rows)),
        },
        responses=torch.zeros(rows, 3, dtype=torch.long),
        response_mask=torch.ones(rows, 3, dtype=torch.bool),
        group=[row // 2 for row in range(rows)],
    )


def test_scores_are_the_weighted_sum_of_the_functions_that_apply():
    batch = batch_of(2)
    weighted_sum = WeightedSum([Fixed(1.0, 2.0), Fixed(4.0, None)], [2.0, -0.5], RewardExecutor())
    assert weighted_sum(batch) == [True, True]
    assert batch.scores.tolist() == [0.0, 4.0]
    assert batch.scores.dtype == torch.float32


def test_each_function_has_its_own_name_and_column():
    batch = batch_of(1)
    WeightedSum([Fixed(1.0), Fixed(None), Fixed(3.0)], None, RewardExecutor())(batch)
    assert batch.scores.tolist() == [4.0]
    assert batch.columns["scores/fixed"] == [1.0]
    assert math.isnan(batch.columns["scores/fixed_2"][0])
    assert batch.columns["scores/fixed_3"] == [3.0]


def test_a_row_without_a_score_ends_the_run():
    with pytest.raises(RewardError) as caught:
        WeightedSum(Fixed(1.0, None), None, RewardExecutor())(batch_of(2))
    assert str(caught.value) == (
        "no reward function applies to this row. Return a number for it.\n"
        "  prompt: prompt 0\n  completion: completion 1"
    )


def test_a_failure_skips_all_rows_of_its_prompt():
    batch = batch_of(4)
    weighted_sum = WeightedSum(
        [Fixed(1, 2, 3, 4), Fixed(0, 0, math.nan, 0)],
        None,
        RewardExecutor(skip_failed_prompts=True),
    )
    with pytest.warns(UserWarning, match="'fixed_2' returned nan, .* number\n  prompt: prompt 1"):
        assert weighted_sum(batch) == [True, True, False, False]
    assert batch.scores.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert batch.response_mask.all(1).tolist() == [True, True, False, False]
    assert batch.response_mask.any(1).tolist() == [True, True, False, False]
    assert [math.isnan(score) for score in batch.columns["scores/fixed"]] == [0, 0, 1, 1]


def test_functions_and_weights_must_have_equal_numbers():
    with pytest.raises(UserError, match=r"There is no reward function. Set --reward.functions"):
        WeightedSum([], None, RewardExecutor())
    with pytest.raises(UserError, match=r"found 2 weights for 1 functions. Set --reward.weights"):
        WeightedSum(Fixed(1.0), [1.0, 2.0], RewardExecutor())

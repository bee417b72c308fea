import math

import pytest
import torch

from lit_align.batches import Experience
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import RewardExecutor
from lit_align.rewards.weighted_sum import WeightedSum


class Fixed(RewardFunction):
    def __init__(self, *scores):
        self.scores = scores

    def __call__(self, batch):
        return [self.scores[row] for row in batch.columns["row"]]


def answered(rows: int) -> Experience:
    """Two rows per prompt."""
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


def test_scores_are_the_weighted_sum_of_what_applies():
    batch = answered(2)
    weighted_sum = WeightedSum([Fixed(1.0, 2.0), Fixed(4.0, None)], [2.0, -0.5], RewardExecutor())
    assert weighted_sum(batch) == [True, True]
    assert batch.scores.tolist() == [0.0, 4.0]
    assert batch.scores.dtype == torch.float32


def test_each_source_has_a_column_and_a_name_of_its_own():
    batch = answered(1)
    WeightedSum([Fixed(1.0), Fixed(None), Fixed(3.0)], None, RewardExecutor())(batch)
    assert batch.scores.tolist() == [4.0]
    assert batch.columns["scores/fixed"] == [1.0]
    assert math.isnan(batch.columns["scores/fixed_2"][0])
    assert batch.columns["scores/fixed_3"] == [3.0]


def test_a_row_to_which_nothing_applies_is_shown():
    with pytest.raises(RewardError) as caught:
        WeightedSum(Fixed(1.0, None), None, RewardExecutor())(answered(2))
    assert str(caught.value) == (
        "no reward function applies to this row\n  prompt: prompt 0\n  completion: completion 1"
    )


def test_a_failure_takes_all_rows_of_its_prompt_and_nothing_else():
    batch = answered(4)
    weighted_sum = WeightedSum(
        [Fixed(1, 2, 3, 4), Fixed(0, 0, math.nan, 0)],
        None,
        RewardExecutor(skip_failed_prompts=True),
    )
    with pytest.warns(UserWarning, match="reward 'fixed_2' returned nan\n  prompt: prompt 1"):
        assert weighted_sum(batch) == [True, True, False, False]
    assert batch.scores.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert batch.response_mask.all(1).tolist() == [True, True, False, False]
    assert batch.response_mask.any(1).tolist() == [True, True, False, False]
    assert [math.isnan(score) for score in batch.columns["scores/fixed"]] == [0, 0, 1, 1]


def test_sources_and_weights_fit_together():
    with pytest.raises(ValueError, match="give at least one reward function"):
        WeightedSum([], None, RewardExecutor())
    with pytest.raises(ValueError, match="2 weights for 1 reward functions"):
        WeightedSum(Fixed(1.0), [1.0, 2.0], RewardExecutor())

"""Reward variance increase (arXiv:2505.23247): examples by hand, and properties of all groups."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_align.functional.returns import group_relative
from lit_align.functional.variance import increase_variance

EQUAL = [0.25] * 4


def increased(scores, probs, low=0.0, high=1.0, split_ties=False):
    rows = (torch.tensor([row], dtype=torch.double) for row in (scores, probs))
    return increase_variance(*rows, low, high, split_ties).squeeze(0)


def mean_and_variance(scores, probs):
    mean = (probs * scores).sum(-1)
    return mean, (probs * scores.square()).sum(-1) - mean.square()


@pytest.mark.parametrize(
    ("probs", "scores", "expected"),
    [
        (EQUAL, [0.9, 0.6, 0.4, 0.1], [1, 1, 0, 0]),
        ([0.1, 0.5, 0.15, 0.25], [0.2, 0.4, 0.9, 0.1], [0, 0.46, 1, 0]),
        (EQUAL, [1, 1, 0, 0], [1, 1, 0, 0]),
        (EQUAL, [0.5] * 4, [0.5] * 4),
        (EQUAL, [0.502, 0.501, 0.5, 0.499], [1, 1, 0.002, 0]),
    ],
    ids=["equal", "unequal", "at the bounds", "ties", "small gaps"],
)
def test_the_maximizer_by_hand(assert_close, probs, scores, expected):
    assert_close(increased(scores, probs), expected, 1e-12)


def test_group_advantages_of_raw_and_of_increased_scores(assert_close):
    """Scaled by the biased standard deviation, then without scaling."""
    population = math.sqrt(4 / 3)
    raw = group_relative(torch.tensor([[0.9, 0.6, 0.4, 0.1]], dtype=torch.double))
    assert_close(raw * population, [[1.371989, 0.342997, -0.342997, -1.371989]], 5e-6)
    advantages = group_relative(increased([0.9, 0.6, 0.4, 0.1], EQUAL).unsqueeze(0))
    assert_close(advantages * population, [[1, 1, -1, -1]], 3e-6)
    adjusted = increased([0.2, 0.4, 0.9, 0.1], [0.1, 0.5, 0.15, 0.25]).unsqueeze(0)
    expected = [[-0.886102, 0.230629, 1.541575, -0.886102]]
    assert_close(group_relative(adjusted) * population, expected, 5e-6)
    assert_close(group_relative(adjusted, scale=False), [[-0.365, 0.095, 0.635, -0.365]], 1e-12)


def test_the_variance_increases():
    for probs, scores, before, after in (
        (EQUAL, [0.9, 0.6, 0.4, 0.1], 0.085, 0.25),
        ([0.1, 0.5, 0.15, 0.25], [0.2, 0.4, 0.9, 0.1], 0.0636, 0.1114),
        (EQUAL, [0.502, 0.501, 0.5, 0.499], 1.25e-6, 0.249501),
    ):
        weights = torch.tensor(probs, dtype=torch.double)
        raw = torch.tensor(scores, dtype=torch.double)
        assert mean_and_variance(raw, weights)[1].item() == pytest.approx(before)
        adjusted = increased(scores, probs)
        assert mean_and_variance(adjusted, weights)[1].item() == pytest.approx(after, abs=1e-6)


def test_split_ties_rank_by_column():
    assert increased([0.5] * 4, EQUAL, split_ties=True).tolist() == [1, 1, 0, 0]
    split = increased([0.1, 0.5, 0.9, 0.5], EQUAL, split_ties=True)
    assert split.tolist() == pytest.approx([0, 1, 1, 0])


def test_an_empty_range_returns_the_scores():
    scores = torch.tensor([[0.3, 7.0]])
    assert torch.equal(increase_variance(scores, scores, 1.0, 1.0), scores)
    assert torch.equal(increase_variance(scores, scores, 1.0, 0.0), scores)


def test_scores_outside_the_range_are_clipped_to_it():
    assert increased([5.0, -3.0], [0.5, 0.5]).tolist() == [1, 0]
    assert increased([5.0, 2.0, 0.0], [0.25, 0.25, 0.5]).tolist() == [1, 1, 0]


def test_a_single_score_and_the_dtype_are_kept():
    assert increased([0.3], [1.0]).tolist() == pytest.approx([0.3])
    scores = torch.rand(3, 5)
    assert increase_variance(scores, torch.full((3, 5), 0.2), 0.0, 1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("probs", "scores", "expected"),
    [
        ([0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]),
        ([0.5, 0.5, 0], [1, 1, 0], [1, 1, 0]),
        ([0, 1, 0], [0.9, 0.5, 0.1], [1, 0.5, 0]),
        ([1, 0, 0], [0.9, 0.5, 0.1], [0.9, 0, 0]),
        ([0, 0, 1], [0.9, 0.5, 0], [0.9, 0.5, 0]),
    ],
)
def test_responses_of_probability_0_keep_their_rank(assert_close, probs, scores, expected):
    """They keep their score if the others do not determine it."""
    for split_ties in (False, True):
        assert_close(increased(scores, probs, split_ties=split_ties), expected, 1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
def test_scores_at_the_bounds_are_returned_exactly(low, high):
    """The mean must equal a partial sum of the probabilities to the last bit."""
    probs = torch.randn(2000, 8, dtype=torch.double).mul(4).softmax(-1)
    scores = torch.tensor([low, high], dtype=torch.double)[torch.randint(2, (2000, 8))]
    assert torch.equal(increase_variance(scores, probs, low, high), scores)


def random_groups(num_groups, size, spread=2.0, levels=6):
    probs = torch.randn(num_groups, size, dtype=torch.double).mul(spread).softmax(-1)
    scores = torch.randint(0, levels + 1, (num_groups, size)).double() / levels
    return scores, probs


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from([1, 4, 300]),
    st.sampled_from([1, 30]),
)
def test_mean_order_and_range_are_kept_and_variance_grows(size, seed, split_ties, spread, levels):
    """For any probabilities, down to exact zeros."""
    torch.manual_seed(seed)
    scores, probs = random_groups(200, size, spread, levels)
    adjusted = increase_variance(scores, probs, 0.0, 1.0, split_ties)
    assert adjusted.isfinite().all()
    assert ((adjusted >= 0) & (adjusted <= 1)).all()
    (mean, variance), (new_mean, new_variance) = (
        mean_and_variance(x, probs) for x in (scores, adjusted)
    )
    torch.testing.assert_close(new_mean, mean, rtol=0, atol=1e-14)
    assert (new_variance >= variance - 1e-14).all()
    higher = scores.unsqueeze(-1) > scores.unsqueeze(-2)
    gap = adjusted.unsqueeze(-1) - adjusted.unsqueeze(-2)
    assert (gap[higher] >= 0).all()
    if not split_ties:
        assert (gap[scores.unsqueeze(-1) == scores.unsqueeze(-2)] == 0).all()


def test_it_is_idempotent_and_commutes_with_permutations_and_affine_maps():
    scores, probs = random_groups(500, 9, spread=1.0)
    adjusted = increase_variance(scores, probs, 0.0, 1.0)

    def assert_equal(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)

    assert_equal(increase_variance(adjusted, probs, 0.0, 1.0), adjusted)
    order = torch.randperm(9)
    shuffled = increase_variance(scores[:, order], probs[:, order], 0.0, 1.0)
    assert_equal(shuffled, adjusted[:, order])
    assert_equal(increase_variance(3 * scores - 5, probs, -5.0, -2.0), 3 * adjusted - 5)


@pytest.mark.parametrize("split_ties", [True, False])
@pytest.mark.parametrize("size", [2, 7, 12])
def test_at_most_one_block_is_between_the_bounds(size, split_ties):
    """With its probability P and fraction f, Var = (M - c) (c - m) - P (M - m)^2 f (1 - f)."""
    low, high = -1.0, 3.0
    scores, probs = random_groups(2000, size, spread=1.0)
    adjusted = increase_variance(low + (high - low) * scores, probs, low, high, split_ties)
    fraction = (adjusted - low) / (high - low)
    between = (fraction > 1e-12) & (fraction < 1 - 1e-12)
    one = adjusted.where(between, -torch.inf).amax(-1, keepdim=True)
    assert ((adjusted == one) | ~between).all()
    if split_ties:
        assert between.sum(-1).max() == 1
    mean, variance = mean_and_variance(adjusted, probs)
    inner = (probs * between).sum(-1)
    f = torch.where(between, fraction, 0).amax(-1)
    expected = (high - mean) * (mean - low) - inner * (high - low) ** 2 * f * (1 - f)
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [6, 50])
def test_no_vertex_of_the_problem_has_a_larger_variance(size):
    """Algorithm 1 of the paper: a top block at `high`, one value for the next, the rest `low`."""
    scores, probs = random_groups(100, size, levels=1000)
    scores = scores.sort(-1, descending=True).values
    adjusted = increase_variance(scores, probs, 0.0, 1.0, split_ties=True)
    mean, variance = mean_and_variance(adjusted, probs)
    best = torch.zeros_like(mean)
    for top, rest in itertools.combinations(range(size + 1), 2):
        middle = (mean - probs[:, :top].sum(-1)) / probs[:, top:rest].sum(-1)
        vertex = torch.zeros_like(scores)
        vertex[:, :top], vertex[:, top:rest] = 1, middle.unsqueeze(-1)
        found = mean_and_variance(vertex, probs)[1]
        best = torch.where((middle >= 0) & (middle <= 1), torch.maximum(best, found), best)
    torch.testing.assert_close(variance, best, rtol=0, atol=1e-12)


def test_a_group_with_a_nan_is_returned_unchanged():
    scores = torch.tensor([[0.2, math.nan, 0.4]])
    adjusted = increase_variance(scores, torch.full((1, 3), 1 / 3), 0.0, 1.0)
    assert torch.equal(adjusted.nan_to_num(9), scores.nan_to_num(9))

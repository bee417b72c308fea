"""Rewards, returns and advantages."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_align.functional.kl import k1
from lit_align.functional.masks import whiten
from lit_align.functional.returns import (
    dpo_token_rewards,
    gae,
    group_relative,
    leave_one_out,
    on_last_token,
    rewards_to_go,
)

HOLES = torch.tensor([[True, False, True, True, False], [False] * 5, [False] * 4 + [True]])


def without_holes(function, *tensors, mask):
    """Apply `function` to the real tokens of each row and write the results to their positions."""
    out = torch.zeros_like(tensors[0])
    for row, real in enumerate(mask):
        packed = [tensor[row, real].unsqueeze(0) for tensor in tensors]
        out[row, real] = function(*packed, torch.ones_like(packed[0], dtype=torch.bool))
    return out


def test_a_score_is_put_on_the_last_real_token():
    scores = torch.tensor([7.0, 8.0, 9.0])
    expected = [[0, 0, 0, 7, 0], [0] * 5, [0, 0, 0, 0, 9]]
    assert on_last_token(scores, HOLES).tolist() == expected


def test_the_score_of_a_row_without_tokens_is_not_read():
    scores = torch.tensor([7.0, math.nan, 9.0], requires_grad=True)
    on_last_token(scores, HOLES).sum().backward()
    assert scores.grad.tolist() == [1, 0, 1]


def test_a_return_sums_the_rewards_from_its_token_on():
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]])
    assert rewards_to_go(rewards, mask).tolist() == [[3, 2, 0]]


def test_returns_are_discounted_per_real_token():
    """A reward one real token later counts half, whatever the width of the hole."""
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0, 9.0]])
    assert rewards_to_go(rewards, HOLES[:1], gamma=0.5).tolist() == [[3, 0, 4, 4, 0]]


def test_gae_sums_decayed_temporal_difference_errors():
    """The errors are 1 + 2 - 1 = 2 and 5 - 2 = 3; the second has half weight in the first."""
    rewards, values = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    assert advantages.tolist() == [[3.5, 3]]
    assert returns.tolist() == [[4.5, 5]]


def test_without_values_and_decay_advantages_are_returns():
    rewards = torch.randn(3, 5)
    advantages, returns = gae(rewards, torch.zeros(3, 5), HOLES, 0.9, 1.0)
    torch.testing.assert_close(advantages, rewards_to_go(rewards, HOLES, 0.9))
    assert torch.equal(advantages, returns)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_recursions_match_the_definition_with_holes_anywhere(length, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, length, dtype=torch.double, generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.7

    def returns_of(row, real):
        sums, later = torch.zeros_like(row), 0.0
        for t in reversed(range(row.shape[1])):
            sums[:, t] = later = row[:, t] + gamma * later
        return sums

    def advantages_of(row, value, real):
        out, later, next_value = torch.zeros_like(row), 0.0, 0.0
        for t in reversed(range(row.shape[1])):
            delta = row[:, t] + gamma * next_value - value[:, t]
            out[:, t] = later = delta + gamma * lam * later
            next_value = value[:, t]
        return out

    expected = without_holes(returns_of, rewards, mask=mask)
    torch.testing.assert_close(rewards_to_go(rewards, mask, gamma), expected)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, without_holes(advantages_of, rewards, values, mask=mask))
    assert torch.equal(returns, torch.where(mask, advantages + values, 0))


@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: rewards_to_go(x, HOLES, 0.9),
        lambda x, y: torch.stack(gae(x, y, HOLES)),
        lambda x, y: dpo_token_rewards(x, y, HOLES, 0.5, 0.3),
    ],
    ids=["rewards_to_go", "gae", "dpo_token_rewards"],
)
def test_values_outside_the_mask_are_never_read(function, outside):
    inputs = torch.randn(2, 3, 5, dtype=torch.double)
    x, y = (torch.where(HOLES, part, outside).requires_grad_() for part in inputs)
    dirty = function(x, y)
    assert torch.equal(dirty, function(*inputs))
    assert (dirty[..., ~HOLES] == 0).all()
    dirty.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~HOLES] == 0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_are_centered_and_scaled(scale):
    """The mean is 2 and the unbiased standard deviation sqrt(2)."""
    advantages = group_relative(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), scale)
    size = 1 / (math.sqrt(2) + 1e-6) if scale else 1
    assert advantages.flatten().tolist() == pytest.approx([-size, size, 0, 0])


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 16777217.0, -7.7])
def test_equal_scores_have_advantages_of_exactly_0(score, scale):
    scores = torch.full((2, 7), score)
    assert (group_relative(scores, scale) == 0).all()
    assert (leave_one_out(scores) == 0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_one_has_advantage_0(scale):
    assert group_relative(torch.tensor([[5.0], [3.0]]), scale).tolist() == [[0], [0]]


def test_a_nan_score_makes_all_advantages_of_its_group_nan():
    assert group_relative(torch.tensor([[1.0, math.nan]])).isnan().all()


def test_leave_one_out_subtracts_the_mean_of_the_other_scores():
    assert leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3, -1.5, 4.5]]


def test_leave_one_out_refuses_a_group_of_one():
    with pytest.raises(ValueError, match="at least 2 responses per prompt, found 1"):
        leave_one_out(torch.ones(3, 1))


class TestDpoTokenRewards:
    """A response of 4 tokens and a padding token that must not be read (RTO, arXiv:2404.18922)."""

    policy = torch.tensor([[-1, -0.5, -2, -0.3, math.nan]], dtype=torch.double)
    ref = torch.tensor([[-1.2, -0.5, -1, -0.8, math.nan]], dtype=torch.double)
    dpo = torch.tensor([[-0.9, -1.1, -3, -0.2, math.nan]], dtype=torch.double)
    mask = torch.tensor([[True] * 4 + [False]])
    values = torch.tensor([[0.5, 0.4, 0.3, 0.6, 9.0]], dtype=torch.double)

    def rewards(self, score):
        dense = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        kl = torch.where(self.mask, k1(self.policy, self.ref), 0)
        return dense - 0.01 * kl + on_last_token(torch.tensor([score]), self.mask)

    def test_the_mask_is_applied_before_coef_and_coef_before_clip(self, assert_close):
        clipped = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        assert_close(clipped, [[0.015, -0.03, -0.05, 0.03, 0]], 1e-12)
        plain = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05)
        assert_close(plain, [[0.015, -0.03, -0.1, 0.03, 0]], 1e-12)

    def test_coef_0_gives_zeros(self):
        assert (dpo_token_rewards(self.dpo, self.ref, self.mask, 0.0) == 0).all()

    def test_coef_0_reads_no_infinite_log_prob(self):
        never = torch.tensor([[-math.inf, math.nan]])
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert dpo_token_rewards(never, torch.zeros(1, 2), mask, 0.0).tolist() == [[0, 0]]

    def test_rewards_sum_the_dpo_reward_the_kl_penalty_and_the_score(self, assert_close):
        assert_close(self.rewards(1.2), [[0.013, -0.03, -0.04, 1.225, 0]], 1e-7)
        assert self.rewards(10.0)[0, 3].item() == pytest.approx(10.025)

    def test_advantages_and_returns_of_dpo_rewards(self, assert_close):
        advantages, returns = gae(self.rewards(1.2), self.values, self.mask, 1.0, 0.95)
        assert_close(advantages, [[0.560009375, 0.6810625, 0.85375, 0.625, 0]], 1e-7)
        assert_close(returns, [[1.060009375, 1.0810625, 1.15375, 1.225, 0]], 1e-7)
        whitened = whiten(advantages, self.mask)
        population = [[-1.0993947, 0.0101468, 1.5929555, -0.5037075, 0]]
        assert_close(whitened * math.sqrt(4 / 3), population, 1e-5)

    def test_only_unclipped_rewards_sum_to_the_log_ratio_of_the_response(self):
        plain = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05)
        assert plain.sum().item() == pytest.approx(0.05 * (-5.2 + 3.5))
        clipped = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        assert clipped.sum().item() == pytest.approx(-0.035)

    @pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
    def test_a_clip_must_be_above_0(self, clip):
        with pytest.raises(
            ValueError, match=re.escape(f"clip must be above 0 or None, found {clip}")
        ):
            dpo_token_rewards(self.dpo, self.ref, self.mask, clip=clip)


class TestReMaxWeights:
    """Weights of tokens in ReMax (arXiv:2310.10505), from score - baseline = 0.7 and the KL."""

    mask = torch.tensor([[True, True, True, False]])
    kl = k1(
        torch.tensor([[-0.4, -0.8, -0.2, math.nan]]), torch.tensor([[-0.5, -0.6, -0.2, math.nan]])
    )
    gain = torch.tensor([2.1]) - torch.tensor([1.4])

    def test_the_released_code_discounts_the_score_but_not_the_kl(self, assert_close):
        """The last token has one discount factor, the KL has none."""
        discounted = 0.99 * rewards_to_go(on_last_token(self.gain, self.mask), self.mask, 0.99)
        weights = torch.where(self.mask, discounted - 0.05 * self.kl, 0)
        assert_close(weights, [[0.6742093, 0.69607, 0.693, 0]], 1e-6)
        logprobs = torch.tensor([[-0.4, -0.8, -0.2, 0.0]])
        loss = -(weights * logprobs).sum() / self.mask.sum()
        assert float(loss) == pytest.approx(0.32171324, abs=1e-7)

    def test_the_full_step_kl_sums_over_later_tokens(self, assert_close):
        gains = rewards_to_go(on_last_token(self.gain, self.mask), self.mask)
        assert_close(
            torch.where(self.mask, gains - 0.1 * self.kl, 0), [[0.69, 0.72, 0.70, 0]], 1e-6
        )
        full_step = gains - 0.1 * rewards_to_go(self.kl, self.mask)
        assert_close(full_step, [[0.71, 0.72, 0.70, 0]], 1e-6)

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
    """`function` of each row's real tokens alone, put back where they were."""
    out = torch.zeros_like(tensors[0])
    for row, real in enumerate(mask):
        packed = [tensor[row, real].unsqueeze(0) for tensor in tensors]
        out[row, real] = function(*packed, torch.ones_like(packed[0], dtype=torch.bool))
    return out


def test_a_score_lands_on_the_last_real_token():
    scores = torch.tensor([7.0, 8.0, 9.0])
    expected = [[0, 0, 0, 7, 0], [0] * 5, [0, 0, 0, 0, 9]]
    assert on_last_token(scores, HOLES).tolist() == expected


def test_a_row_without_tokens_does_not_read_its_score():
    scores = torch.tensor([7.0, math.nan, 9.0], requires_grad=True)
    on_last_token(scores, HOLES).sum().backward()
    assert scores.grad.tolist() == [1, 0, 1]


def test_a_return_counts_what_is_still_to_come():
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]])
    assert rewards_to_go(rewards, mask).tolist() == [[3, 2, 0]]


def test_a_return_discounts_by_real_tokens():
    """Half a reward one real token later, however wide the hole between."""
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0, 9.0]])
    assert rewards_to_go(rewards, HOLES[:1], gamma=0.5).tolist() == [[3, 0, 4, 4, 0]]


def test_advantages_by_hand():
    """Deltas 1 + 2 - 1 = 2 and 5 - 2 = 3, the second at half weight in the first."""
    rewards, values = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    assert advantages.tolist() == [[3.5, 3]]
    assert returns.tolist() == [[4.5, 5]]


def test_without_values_and_decay_an_advantage_is_a_return():
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
def test_what_lies_outside_is_never_read(function, outside):
    inputs = torch.randn(2, 3, 5, dtype=torch.double)
    x, y = (torch.where(HOLES, part, outside).requires_grad_() for part in inputs)
    dirty = function(x, y)
    assert torch.equal(dirty, function(*inputs))
    assert (dirty[..., ~HOLES] == 0).all()
    dirty.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~HOLES] == 0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_is_centred_and_scaled(scale):
    """Mean 2, unbiased standard deviation sqrt(2)."""
    advantages = group_relative(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), scale)
    size = 1 / (math.sqrt(2) + 1e-6) if scale else 1
    assert advantages.flatten().tolist() == pytest.approx([-size, size, 0, 0])


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 16777217.0, -7.7])
def test_equal_scores_give_exactly_nothing(score, scale):
    scores = torch.full((2, 7), score)
    assert (group_relative(scores, scale) == 0).all()
    assert (leave_one_out(scores) == 0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_one_counts_as_equal(scale):
    assert group_relative(torch.tensor([[5.0], [3.0]]), scale).tolist() == [[0], [0]]


def test_a_missing_score_is_not_hidden():
    assert group_relative(torch.tensor([[1.0, math.nan]])).isnan().all()


def test_leave_one_out_compares_with_the_others():
    assert leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3, -1.5, 4.5]]


def test_leave_one_out_needs_others():
    with pytest.raises(ValueError, match="at least 2 responses per prompt, not 1"):
        leave_one_out(torch.ones(3, 1))


class TestDpoTokenRewards:
    """papers/rto.md T1 to T4, with one padding token that must not be read."""

    policy = torch.tensor([[-1, -0.5, -2, -0.3, math.nan]], dtype=torch.double)
    ref = torch.tensor([[-1.2, -0.5, -1, -0.8, math.nan]], dtype=torch.double)
    dpo = torch.tensor([[-0.9, -1.1, -3, -0.2, math.nan]], dtype=torch.double)
    mask = torch.tensor([[True] * 4 + [False]])
    values = torch.tensor([[0.5, 0.4, 0.3, 0.6, 9.0]], dtype=torch.double)

    def rewards(self, score):
        dense = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        kl = torch.where(self.mask, k1(self.policy, self.ref), 0)
        return dense - 0.01 * kl + on_last_token(torch.tensor([score]), self.mask)

    def test_t1_mask_then_coef_then_clip(self, close):
        clipped = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        close(clipped, [[0.015, -0.03, -0.05, 0.03, 0]], 1e-12)
        plain = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05)
        close(plain, [[0.015, -0.03, -0.1, 0.03, 0]], 1e-12)

    def test_t1b_coef_0_is_really_off(self):
        assert (dpo_token_rewards(self.dpo, self.ref, self.mask, 0.0) == 0).all()

    def test_coef_0_does_not_ask_what_an_impossible_token_costs(self):
        never = torch.tensor([[-math.inf, math.nan]])
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert dpo_token_rewards(never, torch.zeros(1, 2), mask, 0.0).tolist() == [[0, 0]]

    def test_t2_the_reward_of_a_token(self, close):
        close(self.rewards(1.2), [[0.013, -0.03, -0.04, 1.225, 0]], 1e-7)
        assert self.rewards(10.0)[0, 3].item() == pytest.approx(10.025)

    def test_t3_advantages_and_returns(self, close):
        advantages, returns = gae(self.rewards(1.2), self.values, self.mask, 1.0, 0.95)
        close(advantages, [[0.560009375, 0.6810625, 0.85375, 0.625, 0]], 1e-7)
        close(returns, [[1.060009375, 1.0810625, 1.15375, 1.225, 0]], 1e-7)
        whitened = whiten(advantages, self.mask)
        population = [[-1.0993947, 0.0101468, 1.5929555, -0.5037075, 0]]
        close(whitened * math.sqrt(4 / 3), population, 1e-5)

    def test_t4_only_the_unclipped_rewards_sum_to_the_sequence_log_ratio(self):
        plain = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05)
        assert plain.sum().item() == pytest.approx(0.05 * (-5.2 + 3.5))
        clipped = dpo_token_rewards(self.dpo, self.ref, self.mask, 0.05, 0.05)
        assert clipped.sum().item() == pytest.approx(-0.035)

    @pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
    def test_the_clip_is_a_bound_or_off(self, clip):
        with pytest.raises(ValueError, match=re.escape(f"clip is a bound above 0, not {clip}")):
            dpo_token_rewards(self.dpo, self.ref, self.mask, clip=clip)


class TestReMaxWeights:
    """papers/remax.md section 6: the weight of a token, from r - b = 0.7 and the KL to come."""

    mask = torch.tensor([[True, True, True, False]])
    kl = k1(
        torch.tensor([[-0.4, -0.8, -0.2, math.nan]]), torch.tensor([[-0.5, -0.6, -0.2, math.nan]])
    )
    gain = torch.tensor([2.1]) - torch.tensor([1.4])

    def test_r1_the_discount_of_the_release(self, close):
        """One factor even on the last token, none on the KL."""
        discounted = 0.99 * rewards_to_go(on_last_token(self.gain, self.mask), self.mask, 0.99)
        weights = torch.where(self.mask, discounted - 0.05 * self.kl, 0)
        close(weights, [[0.6742093, 0.69607, 0.693, 0]], 1e-6)
        logprobs = torch.tensor([[-0.4, -0.8, -0.2, 0.0]])
        loss = -(weights * logprobs).sum() / self.mask.sum()
        assert float(loss) == pytest.approx(0.32171324, abs=1e-7)

    def test_r3_one_step_and_full_step_kl(self, close):
        gains = rewards_to_go(on_last_token(self.gain, self.mask), self.mask)
        close(torch.where(self.mask, gains - 0.1 * self.kl, 0), [[0.69, 0.72, 0.70, 0]], 1e-6)
        full_step = gains - 0.1 * rewards_to_go(self.kl, self.mask)
        close(full_step, [[0.71, 0.72, 0.70, 0]], 1e-6)

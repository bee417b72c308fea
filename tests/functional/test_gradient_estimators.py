"""Expectations of policy gradients over all responses of a tiny policy."""

import pytest
import torch

from lit_align.functional.kl import k1, k2
from lit_align.functional.losses import clipped_surrogate
from lit_align.functional.returns import dpo_token_rewards, gae, on_last_token, rewards_to_go

# Responses of two tokens out of three: logits of the first token, then of the second after each.
LOGITS = [[0.2, -0.1, 0.4], [0, 0.3, -0.2], [0.5, 0.1, 0], [-0.3, 0.2, 0.1]]
REF = torch.tensor([[0, 0.1, -0.3], [0.4, 0, 0.2], [0, -0.5, 0], [0.3, 0.1, 0]], dtype=torch.double)
SCORES = torch.tensor([1, -0.5, 2, 0.3, 0.7, -1.2, 3, 0.8, 0.5], dtype=torch.double)
GREEDY_SCORE = 0.8  # of the response (2, 1)
FIRST, SECOND = torch.arange(9) // 3, torch.arange(9) % 3
MASK = torch.ones(9, 2, dtype=torch.bool)


def token_logprobs(logits):
    """Return the log-probs [9, 2] of both tokens of all nine responses."""
    table = logits.log_softmax(-1)
    return torch.stack([table[0, FIRST], table[FIRST + 1, SECOND]], -1)


class Tree:
    """All responses of a policy, their probabilities and the gradients of their log-probs."""

    def __init__(self):
        self.logits = torch.tensor(LOGITS, dtype=torch.double, requires_grad=True)
        self.logprobs = token_logprobs(self.logits)
        self.probs = self.logprobs.sum(-1).exp()
        self.ref_logprobs = token_logprobs(REF)
        self.jacobian = torch.autograd.functional.jacobian(token_logprobs, self.logits.detach())

    def samples(self, weights):
        """Return sum_t w_t grad log pi(y_t) of each response [9, 4, 3]."""
        return torch.einsum("nt,ntij->nij", weights.detach(), self.jacobian)

    def expected(self, weights):
        return torch.einsum("n,nij->ij", self.probs.detach(), self.samples(weights))

    def variance(self, weights):
        second = (self.probs.detach() * self.samples(weights).square().sum((1, 2))).sum()
        return (second - self.expected(weights).square().sum()).item()

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.logits, retain_graph=True)[0]


@pytest.fixture
def tree():
    return Tree()


def assert_equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def returns_of(scores):
    return rewards_to_go(on_last_token(scores, MASK), MASK)


def test_remax_is_unbiased_and_has_less_variance(tree):
    objective = (tree.probs * SCORES).sum()
    assert objective.item() == pytest.approx(0.7180112804, abs=1e-10)
    gradient = tree.gradient(objective)
    row = torch.tensor([-0.0332995, -0.1750206, 0.2083201], dtype=torch.double)
    assert_equal(gradient[0], row, 1e-7)
    remax = returns_of(SCORES - GREEDY_SCORE)
    assert_equal(tree.expected(remax), gradient)
    assert tree.variance(returns_of(SCORES)) == pytest.approx(2.1668880, abs=1e-7)
    assert tree.variance(remax) == pytest.approx(1.4673658, abs=1e-7)


def test_a_constant_on_all_scores_changes_only_plain_reinforce(tree):
    plain, shifted = returns_of(SCORES), returns_of(SCORES + 10)
    assert_equal(tree.expected(shifted), tree.expected(plain))
    assert tree.variance(shifted) > 20 * tree.variance(plain)
    assert_equal(returns_of((SCORES + 10) - (GREEDY_SCORE + 10)), returns_of(SCORES - GREEDY_SCORE))


def test_the_full_step_kl_gives_the_gradient_of_the_sequence_kl(tree):
    kl = k1(tree.logprobs, tree.ref_logprobs)
    expected = tree.gradient((tree.probs * kl.sum(-1)).sum())
    assert_equal(tree.expected(rewards_to_go(kl, MASK)), expected)


def test_the_one_step_kl_gives_the_gradient_of_the_k2_loss(tree):
    loss = k2(tree.logprobs, tree.ref_logprobs).sum(-1)
    expected = tree.gradient((tree.probs.detach() * loss).sum())
    assert_equal(tree.expected(k1(tree.logprobs, tree.ref_logprobs)), expected)


def test_the_clipped_loss_at_ratio_1_is_reinforce(tree):
    advantages = returns_of(SCORES - GREEDY_SCORE)
    loss = clipped_surrogate(tree.logprobs, tree.logprobs.detach(), advantages)
    assert_equal(
        -tree.gradient((tree.probs.detach() * loss.sum(-1)).sum()), tree.expected(advantages)
    )


def test_a_critic_does_not_change_the_expectation_at_lam_1(tree):
    """Values depend on the tokens before the action only."""
    values = torch.stack([torch.full((9,), 0.4), torch.tensor([0.1, 2.0, -1.0])[FIRST]], -1)
    advantages, _ = gae(on_last_token(SCORES, MASK), values.double(), MASK, lam=1.0)
    assert_equal(tree.expected(advantages), tree.expected(returns_of(SCORES)))


def test_token_and_sequence_dpo_rewards_have_the_same_gradient(tree):
    """arXiv:2404.18922: RTO, and DDPO with the sum on the last token. Their difference has none."""
    dense = dpo_token_rewards(token_logprobs(REF.flip(0)), tree.ref_logprobs, MASK)
    rto = rewards_to_go(dense, MASK)
    ddpo = returns_of(dense.sum(-1))
    assert_equal(tree.expected(rto), tree.expected(ddpo))
    assert_equal(tree.expected(rto - ddpo), torch.zeros(4, 3, dtype=torch.double))
    assert tree.variance(rto) < tree.variance(ddpo)


def test_the_log_ratio_of_the_optimal_policy_is_the_reward_minus_the_value_of_the_prompt():
    """arXiv:2404.18922 eq. 4.3: beta sum_h log pi* / pi_ref = sum_h r_h - V*(s_1)."""
    beta, ref = 0.3, token_logprobs(REF)
    leaves = (REF[1:].log_softmax(-1) + SCORES.view(3, 3) / beta).log_softmax(-1)
    values = beta * (REF[1:].log_softmax(-1) + SCORES.view(3, 3) / beta).logsumexp(-1)
    root = REF[0].log_softmax(-1) + values / beta
    optimal = torch.stack([root.log_softmax(-1)[FIRST], leaves[FIRST, SECOND]], -1)
    dense = dpo_token_rewards(optimal, ref, MASK, coef=beta)
    assert_equal(dense.sum(-1), SCORES - beta * root.logsumexp(-1))
    assert_equal(dense[:, 0], values[FIRST] - beta * root.logsumexp(-1))


def test_a_truncated_sampler_is_biased_and_so_is_its_baseline():
    """A nucleus leaves out the last token, so that a constant on all scores moves the gradient."""
    probs = torch.tensor([0.6, 0.35, 0.05], dtype=torch.double)
    nucleus = torch.tensor([0.6, 0.35, 0], dtype=torch.double) / 0.95
    scores = torch.tensor([0.0, 1.0, 3.0], dtype=torch.double)
    mask = torch.ones(3, 1, dtype=torch.bool)

    def gradient(sampler, scores):
        weights = rewards_to_go(on_last_token(scores, mask), mask)
        return (sampler.unsqueeze(-1) * weights * (torch.eye(3) - probs)).sum(0).tolist()

    assert gradient(probs, scores) == pytest.approx([-0.3, 0.175, 0.125])
    biased = [-0.22105, 0.23947, -0.01842]
    assert gradient(nucleus, scores) == pytest.approx(biased, abs=5e-6)
    moved = [0.09474, 0.42368, -0.51842]
    assert gradient(nucleus, scores + 10) == pytest.approx(moved, abs=5e-6)
    assert gradient(nucleus, (scores + 10) - 10) == pytest.approx(biased, abs=5e-6)

"""GRPO and RLOO: losses by hand, unbiased gradients by enumeration, settings."""

import itertools

import pytest
import torch
from tiny_models import distance, tiny, weights
from torch.optim import SGD

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.rloo import RLOO
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.returns import group_relative, leave_one_out


class FixedPolicy:
    """A policy with constant log-probs."""

    def __init__(self, logprobs):
        self.constant = torch.tensor(logprobs, dtype=torch.float64)

    def logprobs(self, batch):
        return self.constant


def loss_of(algorithm, policy_logprobs, **fields) -> list:
    """Return the losses of a batch with these fields, under a policy with these log-probs."""
    algorithm.__dict__["policy"] = FixedPolicy(policy_logprobs)
    batch = Experience(**{name: torch.tensor(value) for name, value in fields.items()})
    (loss,) = algorithm.losses(batch)
    return loss.tolist()


def test_grpo_averages_over_the_tokens_of_a_response():
    fields = {
        "logprobs": [[-1.0, -1.0], [-2.0, 0.0]],
        "ref_logprobs": [[-1.0, -1.0], [-2.0, 0.0]],
        "advantages": [[3.0, 3.0], [-3.0, -3.0]],
        "response_mask": [[True, True], [True, False]],
    }
    unchanged = [[-1.0, -1.0], [-2.0, 0.0]]
    losses = loss_of(GRPO(policy=tiny), unchanged, **fields)
    assert losses[0] == [-1.5, -1.5]
    assert losses[1][0] == 3.0
    per_token = GRPO(policy=tiny, loss_aggregation="token_mean")
    assert loss_of(per_token, unchanged, **fields)[0] == [-3.0, -3.0]


def test_grpo_clips_low_and_high_separately_and_logs_the_fractions():
    fields = {
        "logprobs": [[0.0, 0.0]],
        "ref_logprobs": [[0.0, 0.0]],
        "advantages": [[1.0, -1.0]],
        "response_mask": [[True, True]],
    }
    algorithm = GRPO(
        policy=tiny, kl_coef=0.0, clip_low=0.1, clip_high=0.3, loss_aggregation="token_mean"
    )
    ratios = torch.tensor([[2.0, 0.5]], dtype=torch.float64).log().tolist()
    assert loss_of(algorithm, ratios, **fields)[0] == pytest.approx([-1.3, 0.9])
    sums = algorithm.metrics.sums.items()
    means = {name: float(total / number) for name, (total, number) in sums}
    assert means == {
        "clip_ratio/low_mean": 0.5, "clip_ratio/high_mean": 0.5, "clip_ratio/region_mean": 1.0
    }  # fmt: skip


def test_grpo_adds_the_kl_to_the_loss():
    fields = {
        "logprobs": [[-1.0]],
        "ref_logprobs": [[-2.0]],
        "advantages": [[0.0]],
        "response_mask": [[True]],
    }
    k3 = torch.tensor(-1.0, dtype=torch.float64).exp().item() + 1 - 1
    assert loss_of(GRPO(policy=tiny, kl_coef=0.5), [[-1.0]], **fields)[0] == pytest.approx(
        [0.5 * k3]
    )


def test_the_loss_denominator_counts_responses_or_tokens():
    batch = Experience(response_mask=torch.tensor([[True, True], [False, False], [True, False]]))
    assert GRPO(policy=tiny).loss_denominator(batch) == 2
    assert GRPO(policy=tiny, loss_aggregation="token_mean").loss_denominator(batch) == 3
    assert RLOO(policy=tiny).loss_denominator(batch) == 2


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_a_group_of_one_is_refused(kind):
    with pytest.raises(UserError, match=f"at least 2 for {kind.__name__}, .* found 1. Set"):
        kind(policy=tiny, num_samples=1)


def test_rloo_clips_the_ratio_of_the_response():
    fields = {
        "logprobs": [[-1.0, -2.0], [-1.0, 7.0]],
        "advantages": [2.0, -2.0],
        "response_mask": [[True, True], [True, False]],
    }
    unchanged = [[-1.0, -2.0], [-1.0, -50.0]]  # the last token is masked
    assert loss_of(RLOO(policy=tiny), unchanged, **fields) == [-2.0, 2.0]
    moved = [[-0.5, -1.5], [-2.0, 0.0]]  # ratios e and 1/e, both clipped
    assert loss_of(RLOO(policy=tiny), moved, **fields) == pytest.approx([-2.4, 1.6])


# Responses of two tokens from a vocabulary of three. The policy is a table of logits: of the first
# token, and of the second token after each first one.
FIRST = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
SECOND = torch.tensor([[0.0, 0.3, -0.2], [0.5, 0.1, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.7, -1.2], [3.0, 0.8, 0.5]], dtype=torch.float64)


def responses():
    """Return logits, log-probs (differentiable), probabilities and rewards of all 9 responses."""
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    table = first.log_softmax(-1).unsqueeze(1) + second.log_softmax(-1)
    logprobs = table.flatten()
    return (first, second), logprobs, logprobs.exp().detach(), REWARDS.flatten()


def expected_gradient(advantages_of) -> list[torch.Tensor]:
    """Return the gradient of the surrogate, averaged over all pairs of responses (G = 2)."""
    parameters, logprobs, probs, rewards = responses()
    loss = 0.0
    for a, b in itertools.product(range(9), repeat=2):
        advantages = advantages_of(rewards[[a, b]].unsqueeze(0))[0]
        surrogate = -(advantages * logprobs[[a, b]]).mean()
        loss = loss + probs[a] * probs[b] * surrogate
    return list(torch.autograd.grad(loss, parameters))


def true_gradient() -> list[torch.Tensor]:
    """Return the gradient of the expected reward."""
    parameters, logprobs, _, rewards = responses()
    return list(torch.autograd.grad((logprobs.exp() * rewards).sum(), parameters))


def test_the_expected_gradient_of_rloo_is_the_true_gradient():
    estimate = expected_gradient(leave_one_out)
    for expected, true in zip(estimate, true_gradient(), strict=True):
        torch.testing.assert_close(-expected, true, atol=1e-12, rtol=0)


def test_the_expected_gradient_of_unscaled_grpo_is_the_true_one_times_g_minus_1_over_g():
    estimate = expected_gradient(lambda scores: group_relative(scores, scale=False))
    for expected, true in zip(estimate, true_gradient(), strict=True):
        torch.testing.assert_close(-2 * expected, true, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_the_ratio_is_one_at_the_first_step(run, kind):
    class RecordingRatio(kind):
        def losses(self, batch):
            is_one = torch.equal(self.policy.logprobs(batch).detach(), batch.logprobs)
            self.is_one = [*getattr(self, "is_one", []), is_one]
            yield from super().losses(batch)

    algorithm = RecordingRatio(policy=tiny, update_epochs=2)
    logged = run(algorithm, num_batches=1).callback_metrics
    assert algorithm.is_one == [True, False]
    assert "frac_reward_zero_std" in logged


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_microbatches_do_not_change_the_result(run, kind):
    results = []
    for size in (8192, 12):
        algorithm = kind(
            policy=tiny,
            num_samples=2,
            update_epochs=2,
            minibatch_size=4,
            microbatch_tokens=size,
            optimizer=lambda p: SGD(p, lr=0.1),
        )
        run(algorithm, num_batches=2)
        results.append(weights(algorithm))
    assert distance(results[0], weights(tiny())) > 1e-3
    assert distance(*results) < 1e-5


def test_a_minibatch_size_that_does_not_divide_is_refused(run):
    with pytest.raises(UserError, match="minibatch_size 3 does not divide the 8 rows"):
        run(GRPO(policy=tiny, num_samples=2, minibatch_size=3))


def test_a_single_update_needs_one_forward_pass_of_the_policy_less(run):
    """Weights and metrics equal those of a run with a pass before the update."""

    class TwoPasses(GRPO):
        shaping_needs_logprobs = True

    results = []
    for kind in (GRPO, TwoPasses):
        algorithm = kind(policy=tiny, optimizer=lambda p: SGD(p, lr=0.1))
        passes = []
        algorithm.configure_model()
        algorithm.policy.register_forward_hook(lambda *args, passes=passes: passes.append(1))
        logged = run(algorithm, num_batches=2).callback_metrics
        results.append((weights(algorithm), logged, len(passes)))
    (one_pass, metrics, num_passes), (two_passes, expected, num_expected) = results
    assert distance(one_pass, two_passes) == 0
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-5, abs=1e-6
    )
    assert num_expected - num_passes == 2  # one per rollout

"""Group methods: what a response is worth beside its siblings, and how tokens are weighed."""

import itertools

import pytest
import torch
from tiny_models import distance, tiny, weights
from torch.optim import SGD

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.rloo import RLOO
from lit_align.batches import Experience
from lit_align.functional.returns import group_relative, leave_one_out


class Said:
    """Stands for a policy that gives fixed log-probs."""

    def __init__(self, logprobs):
        self.given = torch.tensor(logprobs, dtype=torch.float64)

    def logprobs(self, batch):
        return self.given


def one_loss(algorithm, said, **fields) -> list:
    algorithm.__dict__["policy"] = Said(said)
    batch = Experience(**{name: torch.tensor(value) for name, value in fields.items()})
    (loss,) = algorithm.losses(batch)
    return loss.tolist()


def test_grpo_averages_a_response_over_its_own_tokens():
    fields = {
        "logprobs": [[-1.0, -1.0], [-2.0, 0.0]],
        "ref_logprobs": [[-1.0, -1.0], [-2.0, 0.0]],
        "advantages": [[3.0, 3.0], [-3.0, -3.0]],
        "response_mask": [[True, True], [True, False]],
    }
    same = [[-1.0, -1.0], [-2.0, 0.0]]
    assert one_loss(GRPO(policy=tiny), same, **fields)[0] == [-1.5, -1.5]
    assert one_loss(GRPO(policy=tiny), same, **fields)[1][0] == 3.0
    assert one_loss(GRPO(policy=tiny, loss_aggregation="token_mean"), same, **fields)[0] == [
        -3.0,
        -3.0,
    ]


def test_grpo_clips_low_and_high_apart_and_notes_it():
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
    assert one_loss(algorithm, ratios, **fields)[0] == pytest.approx([-1.3, 0.9])
    sums = algorithm.metrics.sums.items()
    noted = {name: float(total / number) for name, (total, number) in sums}
    assert noted == {
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
    assert one_loss(GRPO(policy=tiny, kl_coef=0.5), [[-1.0]], **fields)[0] == pytest.approx(
        [0.5 * k3]
    )


def test_counts():
    batch = Experience(response_mask=torch.tensor([[True, True], [False, False], [True, False]]))
    assert GRPO(policy=tiny).loss_denominator(batch) == 2
    assert GRPO(policy=tiny, loss_aggregation="token_mean").loss_denominator(batch) == 3
    assert RLOO(policy=tiny).loss_denominator(batch) == 2


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_a_group_of_one_is_refused(kind):
    with pytest.raises(ValueError, match="num_samples must be at least 2, found 1"):
        kind(policy=tiny, num_samples=1)


def test_rloo_weighs_whole_responses():
    fields = {
        "logprobs": [[-1.0, -2.0], [-1.0, 7.0]],
        "advantages": [2.0, -2.0],
        "response_mask": [[True, True], [True, False]],
    }
    said = [[-1.0, -2.0], [-1.0, -50.0]]
    assert one_loss(RLOO(policy=tiny), said, **fields) == [-2.0, 2.0]
    half = [[-0.5, -1.5], [-2.0, 0.0]]  # ratios e and 1/e: the first is clipped, so is the second
    assert one_loss(RLOO(policy=tiny), half, **fields) == pytest.approx([-2.4, 1.6])


# Two tokens of a vocabulary of three; the policy is a table: logits of the first token, and of
# the second given the first.
FIRST = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
SECOND = torch.tensor([[0.0, 0.3, -0.2], [0.5, 0.1, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.7, -1.2], [3.0, 0.8, 0.5]], dtype=torch.float64)


def answers():
    """All nine answers: log-prob (differentiable), probability and reward."""
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    table = first.log_softmax(-1).unsqueeze(1) + second.log_softmax(-1)
    logprobs = table.flatten()
    return (first, second), logprobs, logprobs.exp().detach(), REWARDS.flatten()


def expected_gradient(advantages_of) -> list[torch.Tensor]:
    """Of the surrogate, over all pairs of answers to a prompt (G = 2)."""
    parameters, logprobs, probs, rewards = answers()
    loss = 0.0
    for a, b in itertools.product(range(9), repeat=2):
        advantages = advantages_of(rewards[[a, b]].unsqueeze(0))[0]
        surrogate = -(advantages * logprobs[[a, b]]).mean()
        loss = loss + probs[a] * probs[b] * surrogate
    return list(torch.autograd.grad(loss, parameters))


def true_gradient() -> list[torch.Tensor]:
    parameters, logprobs, _, rewards = answers()
    return list(torch.autograd.grad((logprobs.exp() * rewards).sum(), parameters))


def test_rloos_gradient_is_the_true_one_in_expectation():
    estimate = expected_gradient(leave_one_out)
    for mine, true in zip(estimate, true_gradient(), strict=True):
        torch.testing.assert_close(-mine, true, atol=1e-12, rtol=0)


def test_unscaled_grpos_gradient_is_the_true_one_times_g_minus_1_over_g():
    estimate = expected_gradient(lambda scores: group_relative(scores, scale=False))
    for mine, true in zip(estimate, true_gradient(), strict=True):
        torch.testing.assert_close(-2 * mine, true, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_the_ratio_is_one_at_the_first_step(run, kind):
    class Spy(kind):
        def losses(self, batch):
            same = torch.equal(self.policy.logprobs(batch).detach(), batch.logprobs)
            self.same = [*getattr(self, "same", []), same]
            yield from super().losses(batch)

    algorithm = Spy(policy=tiny, update_epochs=2)
    logged = run(algorithm, num_batches=1).callback_metrics
    assert algorithm.same == [True, False]
    assert "frac_reward_zero_std" in logged


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_micro_batches_do_not_change_the_result(run, kind):
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
    with pytest.raises(ValueError, match="minibatch_size 3 does not divide the 8 rows"):
        run(GRPO(policy=tiny, num_samples=2, minibatch_size=3))


def test_one_update_per_rollout_scores_the_policy_once(run):
    """Weights and metrics are those of a run that scores it before the update as well."""

    class Twice(GRPO):
        shaping_needs_logprobs = True

    results = []
    for kind in (GRPO, Twice):
        algorithm = kind(policy=tiny, optimizer=lambda p: SGD(p, lr=0.1))
        passes = []
        algorithm.configure_model()
        algorithm.policy.register_forward_hook(lambda *args, passes=passes: passes.append(1))
        logged = run(algorithm, num_batches=2).callback_metrics
        results.append((weights(algorithm), logged, len(passes)))
    (once, seen, few), (twice, expected, many) = results
    assert distance(once, twice) == 0
    assert {k: float(v) for k, v in seen.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-5, abs=1e-6
    )
    assert many - few == 2

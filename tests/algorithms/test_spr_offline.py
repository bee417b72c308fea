"""SPR with offline responses: their number, their weights, and metrics without them."""

import math

import pytest
import torch
from tabular import TabularSPR, rollout
from tiny_models import RandomOfflineResponses, tiny, trainer
from torch.optim import SGD

from lit_align.algorithms.spr import SPR
from lit_align.errors import UserError
from lit_align.functional.reweighting import sample_weights

COEFS = {"kl_coef": 0.1, "step_coef": 0.2}


def num_offline_samples(iterations, **settings) -> list[int]:
    algorithm = SPR(policy=tiny, **settings)
    found = []
    for algorithm.iteration in iterations:
        found.append(algorithm.num_offline_samples)
    return found


def test_half_of_the_offline_responses_remain_after_the_half_life():
    times = [0, 1, 8, 9, 16, 24, 56, 57]
    assert num_offline_samples(times, num_offline_samples=4) == [4, 4, 2, 2, 1, 1, 1, 0]
    assert num_offline_samples([0, 8, 9], num_offline_samples=1) == [1, 1, 0]
    assert num_offline_samples(
        [0, 3, 10**6], num_offline_samples=3, offline_half_life=math.inf
    ) == [3, 3, 3]
    assert num_offline_samples([0, 9]) == [0, 0]


def test_a_single_sample_keeps_one_offline_response():
    assert num_offline_samples([0, 10, 10**6], num_offline_samples=3, num_samples=1) == [3, 1, 1]


def weighted_batch(offline_logprobs, offline_scores=None, max_ratio=2.0):
    """Return two prompts of two samples and one offline response, with weights of a moved policy.

    Also returns the responses [2, 3], their log-probs under policy and reference, and the metrics.
    """
    algorithm = TabularSPR(
        num_samples=2,
        num_offline_samples=1,
        offline_half_life=math.inf,
        max_importance_ratio=max_ratio,
        kl_coef=0.1,
        step_kl_coef=0.2,
    )
    algorithm.policy.logits.data += torch.arange(12).view(4, 3) / 6
    groups = torch.tensor([[0, 8, 4], [2, 2, 7]])
    batch = rollout(groups, 2)
    batch.offline_logprobs = [None] * 4 + offline_logprobs
    batch.offline_scores = [None] * 4 + (offline_scores or [None, None])
    with torch.no_grad():
        prepared = algorithm.prepare(batch)
        algorithm.metrics.log_train(algorithm)
        tables = (algorithm.policy, algorithm.reference)
        both = (table.response_logprobs[groups] for table in tables)
    return prepared, groups, *both, algorithm.logged


def expected(batch, logprobs, reference, behavior, max_ratio=2.0):
    return sample_weights(
        batch.scores.view(2, 3),
        logprobs,
        reference,
        behaviour_logprobs=behavior,
        num_online=2,
        max_ratio=max_ratio,
        **COEFS,
    )


def assert_weights(weights, other):
    torch.testing.assert_close(weights.view(2, 3).double(), other, rtol=1e-6, atol=1e-7)


def test_rows_of_a_prompt_are_adjacent_with_the_offline_response_last():
    batch, groups, *_ = weighted_batch([None, None])
    assert batch.group == [0, 0, 0, 1, 1, 1]
    assert batch.is_offline == [False, False, True] * 2
    places = batch.responses @ torch.tensor([3, 1])
    assert torch.equal(places.view(2, 3), groups)


def test_without_a_log_prob_the_reference_generated_the_response():
    batch, _, logprobs, reference, _ = weighted_batch([None, None])
    assert_weights(batch.weights, expected(batch, logprobs, reference, reference))


def test_a_known_log_prob_is_used():
    batch, _, logprobs, reference, _ = weighted_batch([-0.5, None])
    behavior = reference.clone()
    behavior[0, 2] = -0.5
    assert_weights(batch.weights, expected(batch, logprobs, reference, behavior))
    unknown = weighted_batch([None, None])[0]
    assert (batch.weights[:3] - unknown.weights[:3]).abs().max() > 1e-3
    assert torch.equal(batch.weights[3:], unknown.weights[3:])


def test_a_known_score_replaces_the_reward():
    batch, _, logprobs, reference, _ = weighted_batch([None, None], [None, 0.25])
    assert batch.scores[5] == 0.25
    assert torch.equal(batch.scores[:5], weighted_batch([None, None])[0].scores[:5])
    assert_weights(batch.weights, expected(batch, logprobs, reference, reference))


def test_logged_ratios_are_capped():
    """The offline responses were very unlikely. With two samples of three, rho is at most 3/2."""
    *_, free = weighted_batch([-50.0, -50.0], max_ratio=None)
    assert free["spr/ratio_max"] == pytest.approx(1.5)
    assert free["spr/ratio_clipped"] == 0
    batch, _, logprobs, reference, capped = weighted_batch([-50.0, -50.0], max_ratio=1.2)
    assert capped["spr/ratio_max"] == pytest.approx(1.2)
    assert capped["spr/ratio_clipped"] >= 1 / 3
    assert capped["spr/offline_fraction"] == pytest.approx(1 / 3)
    behavior = reference.clone()
    behavior[:, 2] = -50
    assert_weights(batch.weights, expected(batch, logprobs, reference, behavior, 1.2))
    mean = batch.weights.view(2, 3).sum(-1).mean()
    assert capped["spr/ratio_mean"] == pytest.approx(float(mean), rel=1e-6)


def test_metrics_are_of_sampled_rows(tmp_path):
    def logged(**settings):
        algorithm = SPR(policy=tiny, optimizer=lambda p: SGD(p, lr=0.1), **settings)
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0)
        run.fit(algorithm, RandomOfflineResponses(1))
        return {name: float(value) for name, value in run.callback_metrics.items()}

    sampled, mixed = logged(), logged(num_offline_samples=3)
    update_metrics = {"loss", "grad_norm"}
    assert sampled.keys() == mixed.keys()
    differing = {name for name in sampled if sampled[name] != mixed[name]} - update_metrics
    assert all(name.startswith("spr/") for name in differing)
    assert mixed["spr/offline_fraction"] == pytest.approx(3 / 7)


REFUSED = {
    "one sample": ({"num_samples": 1}, "num_samples must be at least 2 for SPR, .* found 1"),
    "no sample": (
        {"num_samples": 0, "num_offline_samples": 4}, "num_samples must be at least 1, found 0"
    ),
    "a negative number": (
        {"num_offline_samples": -1}, "num_offline_samples must be at least 0, found -1"
    ),
    "a divisor of 0": (
        {"kl_coef": 0.0, "step_kl_coef": 0.0}, r"one must be above 0, found 0\.0 and 0\.0"
    ),
    "a negative coefficient": ({"kl_coef": -0.1}, r"kl_coef must be at least 0, found -0\.1"),
    "a cap below 1": (
        {"max_importance_ratio": 0.0}, r"max_importance_ratio must be at least 1, found 0\.0"
    ),
    "a half-life of 0": (
        {"offline_half_life": 0.0}, r"offline_half_life must be above 0, found 0\.0"
    ),
    "minibatches of a shrinking rollout": (
        {"num_offline_samples": 2, "minibatch_size": 8}, r"set --model.offline_half_life \.inf"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_undefined_settings_are_refused(case):
    settings, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        SPR(policy=tiny, **settings)


def test_minibatches_are_accepted_if_the_number_of_rows_is_constant():
    offline = {"num_offline_samples": 2, "offline_half_life": math.inf}
    assert SPR(policy=tiny, minibatch_size=8, **offline).minibatch_size == 8
    assert SPR(policy=tiny, minibatch_size=8).minibatch_size == 8

"""Tabular SPR reaches the KL-regularized optimum, in expectation and from samples."""

import itertools
import math

import pytest
import torch
from tabular import TabularSPR, rollout


def expected_target(algorithm: TabularSPR) -> torch.Tensor:
    """Return the expected SFT target [9]: the mean of the weights over all groups of two."""
    groups = torch.tensor(list(itertools.product(range(9), repeat=2)))
    probs = algorithm.policy.response_logprobs.detach().exp()[groups].prod(-1)
    with torch.no_grad():
        weights = algorithm.prepare(rollout(groups, 2)).weights.double().view(81, 2)
    share = (probs.unsqueeze(-1) * weights).flatten()
    return torch.zeros(9, dtype=torch.double).index_add(0, groups.flatten(), share)


def test_expected_iterations_converge_to_the_optimum():
    """With equal coefficients and groups of two, errors shrink by 3/4 per step, the KL by 9/16."""
    algorithm = TabularSPR(num_samples=2, kl_coef=0.6, step_kl_coef=0.6)
    gaps, objectives = [], []
    for _ in range(20):
        gaps.append(algorithm.gap)
        objectives.append(algorithm.objective)
        target = expected_target(algorithm)
        algorithm.policy.set_probabilities(target / target.sum())
    assert all(after > before for before, after in itertools.pairwise(objectives))
    assert gaps[-1] / gaps[-2] == pytest.approx(9 / 16, abs=2e-2)
    assert gaps[-1] < 1e-4 * gaps[0]


def test_the_optimum_is_a_fixed_point():
    algorithm = TabularSPR(num_samples=2, kl_coef=0.6, step_kl_coef=0.1)
    algorithm.policy.set_probabilities(algorithm.optimum)
    torch.testing.assert_close(expected_target(algorithm), algorithm.optimum, rtol=0, atol=1e-7)


def trained(num_iterations=300, seed=0, **settings) -> TabularSPR:
    """Return SPR after iterations on 64 groups of four samples and uniform offline responses."""
    algorithm = TabularSPR(num_samples=4, kl_coef=0.6, step_kl_coef=0.6, **settings)
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(num_iterations):
        algorithm.lr = 1 / (1 + iteration / 50)
        probs = algorithm.policy.response_logprobs.detach().exp()
        own = torch.multinomial(probs, 64 * 4, replacement=True, generator=generator).view(64, 4)
        others = torch.randint(9, (64, algorithm.num_offline_samples), generator=generator)
        batch = rollout(torch.cat([own, others], 1), 4)
        batch.offline_logprobs = [
            math.log(1 / 9) if is_offline else None for is_offline in batch.is_offline
        ]
        algorithm.training_step(batch, 0)
    return algorithm


@pytest.mark.parametrize("num_offline_samples", [0, 4])
def test_sampled_iterations_close_the_gap(num_offline_samples):
    """The objective's distance from its maximum is kl_coef * KL(policy || optimum)."""
    start, end = (
        TabularSPR(kl_coef=0.6),
        trained(num_offline_samples=num_offline_samples, offline_half_life=20.0),
    )
    assert end.gap < 0.01 * start.gap
    assert end.objective - start.objective == pytest.approx(0.6 * (start.gap - end.gap))


def test_offline_responses_speed_up_the_first_iterations():
    seeds = range(5)
    sampled = sum(trained(20, seed).gap for seed in seeds)
    mixed = sum(
        trained(20, seed, num_offline_samples=8, offline_half_life=20.0).gap for seed in seeds
    )
    assert mixed < 0.8 * sampled

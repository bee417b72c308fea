"""Fixed points, rates and gains of SPR, by enumeration of all groups of samples."""

import itertools

import pytest
import torch

from lit_align.functional.reweighting import (
    effective_sample_fraction,
    log_normalizer,
    log_ratios,
    sample_weights,
    shaped_scores,
)

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
SCORES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.double)
OPTIMUM = (REF.log() + SCORES).softmax(-1)  # for kl_coef 1
OTHER = torch.tensor([0.1, 0.6, 0.3], dtype=torch.double)
POLICY = torch.tensor([0.2, 0.2, 0.6], dtype=torch.double)


def kl(policy, other):
    return (policy * (policy / other).log()).sum()


def objective(policy, kl_coef=1.0):
    return (policy * SCORES).sum() - kl_coef * kl(policy, REF)


def exact_update(policy, kl_coef, step_coef):
    """Return the next policy: the weights of a group with each action once, sampled uniformly."""
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.double).log()
    given = (x.unsqueeze(0) for x in (SCORES, policy.log(), REF.log()))
    coefs = {"kl_coef": kl_coef, "step_coef": step_coef}
    return sample_weights(*given, behaviour_logprobs=uniform, **coefs).squeeze(0)


class Groups:
    """All groups of online samples, followed by offline samples of another policy."""

    def __init__(self, policy, num_online: int, num_offline: int = 0):
        places = itertools.product(range(3), repeat=num_online + num_offline)
        self.actions = torch.tensor(list(places))
        drawn_from = torch.stack([policy] * num_online + [OTHER] * num_offline)
        columns = torch.arange(num_online + num_offline)
        self.probs = drawn_from[columns, self.actions].prod(-1)
        self.policy, self.num_online = policy, num_online

    def rows(self, values):
        return values[self.actions]

    def weights(self, step_coef=2.0):
        return sample_weights(
            self.rows(SCORES),
            self.rows(self.policy.log()),
            self.rows(REF.log()),
            kl_coef=1.0,
            step_coef=step_coef,
            behaviour_logprobs=self.rows(OTHER.log()),
            num_online=self.num_online,
        )

    def target(self, weights):
        """Return the expected target of SFT with these weights, a policy."""
        share = (self.probs.unsqueeze(-1) * weights).flatten()
        return torch.zeros_like(REF).index_add(0, self.actions.flatten(), share)


SIZES = [(2, 0), (3, 0), (1, 1), (2, 1), (1, 3)]  # online and offline samples of a group


@pytest.mark.parametrize(("num_online", "num_offline"), SIZES)
def test_the_optimum_is_a_fixed_point_of_any_group(num_online, num_offline):
    groups = Groups(OPTIMUM, num_online, num_offline)
    torch.testing.assert_close(groups.target(groups.weights()), OPTIMUM, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_online", "num_offline"), SIZES)
def test_the_expected_iteration_reaches_the_optimum(num_online, num_offline):
    policy = POLICY
    for _ in range(100):
        groups = Groups(policy, num_online, num_offline)
        target = groups.target(groups.weights())
        assert float(target.sum()) == pytest.approx(1, abs=1e-12)
        policy = target / target.sum()  # rounding of the sum would grow with each step
    torch.testing.assert_close(policy, OPTIMUM, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_online", [2, 3, 4])
def test_no_other_policy_is_a_fixed_point_of_its_own_samples(num_online):
    """E[G w | y] rises in ell, so any other policy moves, towards the optimum."""
    groups = Groups(POLICY, num_online)
    target = groups.target(groups.weights())
    assert kl(target, OPTIMUM) < kl(POLICY, OPTIMUM)
    ell = shaped_scores(SCORES, POLICY.log(), REF.log(), 1.0, 2.0)
    gain = (target / POLICY)[ell.argsort()]
    assert (gain.diff() > 0).all()


@pytest.mark.parametrize("step_coef", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("num_online", [2, 3, 4])
def test_errors_near_the_optimum_shrink_by_a_known_rate(num_online, step_coef):
    """The rate is 1 - a (1 - 1/n), a = kl / (kl + step)."""
    error = torch.tensor([1.0, -0.4, 0.2], dtype=torch.double)
    error -= (OPTIMUM * error).sum()
    moved = []
    for size in (1e-4, -1e-4):
        groups = Groups((OPTIMUM.log() + size * error).softmax(-1), num_online)
        moved.append(groups.target(groups.weights(step_coef)).log())
    slope = (moved[0] - moved[1]) / 2e-4
    rate = 1 - (1 - 1 / num_online) / (1 + step_coef)
    torch.testing.assert_close(slope, rate * error, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("num_online", "num_offline"), [(1, 1), (2, 1), (1, 3)])
def test_full_self_normalization_would_move_the_fixed_point(num_online, num_offline):
    groups = Groups(OPTIMUM, num_online, num_offline)
    normalized = groups.weights() / groups.weights().sum(-1, keepdim=True)
    assert (groups.target(normalized) - OPTIMUM).abs().max() > 5e-3


@pytest.mark.parametrize(("num_online", "num_offline"), [(1, 1), (1, 3)])
def test_weights_without_the_ratio_would_move_the_fixed_point_more(num_online, num_offline):
    groups = Groups(OPTIMUM, num_online, num_offline)
    normalized = groups.weights() / groups.weights().sum(-1, keepdim=True)
    given = map(groups.rows, (SCORES, OPTIMUM.log(), REF.log()))
    blind = sample_weights(*given, kl_coef=1.0, step_coef=2.0)
    far, near = (kl(OPTIMUM, groups.target(each)) for each in (blind, normalized))
    assert far > 3 * near


def test_a_single_sample_does_not_change_the_policy():
    groups = Groups(POLICY, 1)
    torch.testing.assert_close(groups.target(groups.weights()), POLICY)


@pytest.mark.parametrize(("num_online", "num_offline"), [(1, 1), (1, 3), (3, 1), (0, 2)])
def test_the_mean_ratio_over_all_samplers_is_1(num_online, num_offline):
    size = num_online + num_offline
    ratios = log_ratios(*[x.log().expand(size, 3).T for x in (POLICY, OTHER)], num_online).exp()
    mixture = (num_online * POLICY + num_offline * OTHER) / size
    assert float((mixture * ratios[:, 0]).sum()) == pytest.approx(1, abs=1e-12)
    if num_online:
        assert ratios.max() <= size / num_online


def test_wrong_behavior_log_probs_move_the_mean_ratio_away_from_1():
    """The reference is assumed to be the sampler: the ratios are .2/.35, .2/.25 and .6/.4."""
    assumed = log_ratios(*[x.log().expand(2, 3).T for x in (POLICY, REF)], 1).exp()[:, 0]
    assert assumed.tolist() == pytest.approx([4 / 7, 0.8, 1.5])
    mean = float(((POLICY + OTHER) / 2 * assumed).sum())
    assert mean == pytest.approx(0.15 * 4 / 7 + 0.4 * 0.8 + 0.45 * 1.5)
    assert mean > 1.05


def test_the_ratios_of_a_mixture_by_hand():
    policy, behavior = (torch.tensor([p], dtype=torch.double).T for p in ([0.6, 0.4], [0.2, 0.8]))
    rho = log_ratios(policy.log().expand(2, 4), behavior.log().expand(2, 4), 1).exp()[:, 0]
    assert rho.tolist() == pytest.approx([2, 0.57142857])
    assert float(torch.tensor([0.3, 0.7], dtype=torch.double) @ rho) == pytest.approx(1)


def test_log_z_is_the_best_objective():
    """All samples are from the reference and kl_coef is 1."""
    shaped = shaped_scores(SCORES, REF.log(), REF.log(), 1.0, 0.0)
    log_z = float(log_normalizer(shaped, REF.log()))
    assert log_z == pytest.approx(1.02722218, abs=1e-8)
    assert float(objective(OPTIMUM)) == pytest.approx(log_z, abs=1e-12)


def test_weights_are_divided_by_the_normalizer():
    shaped, log_rho = torch.randn(2, 3, 4, dtype=torch.double)
    weights = ((shaped + log_rho).exp() / log_normalizer(shaped, log_rho).exp().unsqueeze(-1)) / 4
    torch.testing.assert_close(weights.sum(-1), log_rho.exp().mean(-1))


def test_errors_of_log_odds_shrink_by_the_same_factor_in_each_step():
    """log pi_(t+1) - log pi* = (1 - a) (log pi_t - log pi*) + const."""
    policy = POLICY
    for _ in range(4):
        updated = exact_update(policy, 1.0, 3.0)
        before, after = (each.log() - OPTIMUM.log() for each in (policy, updated))
        torch.testing.assert_close(after.diff(), 0.75 * before.diff(), rtol=0, atol=1e-12)
        policy = updated


def test_the_first_gain_of_an_exact_update():
    first = exact_update(REF, 1.0, 1.0)
    gain = float(objective(first) - objective(REF))
    assert gain == pytest.approx(0.24485025, abs=1e-8)
    assert float(kl(first, REF) + 2 * kl(REF, first)) == pytest.approx(gain, abs=1e-12)


def test_the_gap_to_the_optimum_is_its_kl():
    for kl_coef in (0.3, 1.0):
        optimum = (REF.log() + SCORES / kl_coef).softmax(-1)
        gap = objective(optimum, kl_coef) - objective(POLICY, kl_coef)
        assert float(gap) == pytest.approx(float(kl_coef * kl(POLICY, optimum)), abs=1e-12)


def test_the_gain_of_any_candidate_policy():
    """It is (kl + step) (KL(old || q) - KL(new || q)) + step KL(new || old), q the exact target."""
    kl_coef, step_coef = 0.3, 0.7
    target = exact_update(POLICY, kl_coef, step_coef)
    for candidate in (OTHER, REF, target, POLICY):
        closer = kl(POLICY, target) - kl(candidate, target)
        gain = (kl_coef + step_coef) * closer + step_coef * kl(candidate, POLICY)
        expected = objective(POLICY, kl_coef) + gain
        assert float(objective(candidate, kl_coef)) == pytest.approx(float(expected), abs=1e-12)


def test_steps_without_kl_coef_add_up():
    """Mirror descent: T steps multiply the start by exp(T score / step_coef)."""
    policy = REF
    for _ in range(5):
        policy = exact_update(policy, 0.0, 4.0)
    expected = (REF.log() + 5 * SCORES / 4).softmax(-1)
    torch.testing.assert_close(policy, expected, rtol=0, atol=1e-12)


def test_the_effective_sample_fraction_is_between_one_sample_and_all():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert effective_sample_fraction(weights).tolist() == [1.0, 0.25, 0.5]
    random = effective_sample_fraction(torch.rand(100, 5) + 1e-3)
    assert ((random > 0.2) & (random < 1)).all()

"""Sample weights of SPR: examples with three actions, and off-policy samples."""

import itertools

import pytest
import torch

from lit_align.functional.reweighting import sample_weights

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
SCORES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.double)
OPTIMUM = torch.tensor([0.17900002, 0.2919435, 0.52905648], dtype=torch.double)


def row(*values):
    return torch.tensor([values], dtype=torch.double)


def weights_of(scores, logprobs, ref_logprobs, **settings):
    rows = (x.double().unsqueeze(0) for x in (scores, logprobs, ref_logprobs))
    return sample_weights(*rows, **settings).squeeze(0)


def exact_update(policy, kl_coef, step_coef):
    """Return the next policy: the weights of a group with each action once, sampled uniformly."""
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.double).log()
    settings = {"kl_coef": kl_coef, "step_coef": step_coef, "behaviour_logprobs": uniform}
    return weights_of(SCORES, policy.log(), REF.log(), **settings)


def kl(policy, other):
    return (policy * (policy / other).log()).sum().item()


def objective(policy, kl_coef=1.0):
    return (policy * SCORES).sum().item() - kl_coef * kl(policy, REF)


def test_weights_at_the_reference_are_a_softmax_of_scores(assert_close):
    settings = {"kl_coef": 0.4, "step_coef": 0.6}
    zero = row(0, 0)
    assert_close(
        sample_weights(row(1, 0), zero, zero, **settings), row(0.73105858, 0.26894142), 1e-8
    )
    zero = row(0, 0, 0, 0)
    weights = sample_weights(row(2, 1, 0, 0), zero, zero, kl_coef=0.2, step_coef=0.3)
    assert_close(weights, row(0.85326667, 0.11547709, 0.01562812, 0.01562812), 1e-8)


def test_nats_above_the_reference_lower_the_weight(assert_close):
    weights = sample_weights(
        row(1, 0.5, 0), row(-2, -3, -1), row(-2.5, -2.5, -2), kl_coef=0.2, step_coef=0.3
    )
    assert_close(weights, row(0.60254946, 0.33068616, 0.06676438), 1e-8)


def test_weights_at_the_optimum_are_equal(assert_close):
    for step_coef in (0.0, 1.0, 7.0):
        optimum = (REF.log() + SCORES).softmax(-1)
        assert_close(optimum, OPTIMUM, 1e-8)
        settings = {"kl_coef": 1.0, "step_coef": step_coef}
        assert_close(weights_of(SCORES, optimum.log(), REF.log(), **settings), [1 / 3] * 3, 1e-12)


def test_exact_updates_approach_the_optimum(assert_close):
    first = exact_update(REF, 1.0, 1.0)
    second = exact_update(first, 1.0, 1.0)
    assert_close(first, [0.32503989, 0.32154011, 0.35342001], 1e-8)
    assert_close(second, [0.24613109, 0.31263571, 0.4412332], 1e-8)
    optimum, policy, gains, distances = (REF.log() + SCORES).softmax(-1), REF, [], []
    for _ in range(5):
        gains.append(objective(policy))
        distances.append(kl(policy, optimum))
        policy = exact_update(policy, 1.0, 1.0)
    assert gains == pytest.approx([0.7, 0.94485025, 1.00751936, 1.02245878, 1.02605422], abs=1e-8)
    expected = [0.32722218, 0.08237192, 0.01970282, 0.0047634, 0.00116796]
    assert distances == pytest.approx(expected, abs=1e-8)


def test_the_gain_of_an_exact_update():
    """It is step KL(new || old) + (kl + step) KL(old || new), with the two coefficients."""
    kl_coef, step_coef = 0.3, 0.7
    policy = torch.tensor([0.2, 0.2, 0.6], dtype=torch.double)
    updated = exact_update(policy, kl_coef, step_coef)
    gain = objective(updated, kl_coef) - objective(policy, kl_coef)
    expected = step_coef * kl(updated, policy) + (kl_coef + step_coef) * kl(policy, updated)
    assert gain == pytest.approx(expected, abs=1e-12)


def test_one_update_without_step_coef_reaches_the_optimum(assert_close):
    policy = torch.tensor([0.2, 0.2, 0.6], dtype=torch.double)
    assert_close(exact_update(policy, 1.0, 0.0), (REF.log() + SCORES).softmax(-1), 1e-12)


def test_weights_without_kl_coef_ignore_the_reference(assert_close):
    settings = {"kl_coef": 0.0, "step_coef": 2.0}
    assert_close(
        sample_weights(row(4, 0), row(-9, -1), row(-1, -5), **settings), row(2, 0).softmax(-1)
    )


def test_weights_of_equal_scores_are_the_ratios_of_the_balance_heuristic():
    """They are 2 for the first action and 4/7 for the second."""
    policy, behavior = row(0.6, 0.4, 0.4, 0.4).log(), row(0.2, 0.8, 0.8, 0.8).log()
    weights = sample_weights(
        policy * 0,
        policy,
        policy,
        kl_coef=0.1,
        step_coef=0.2,
        behaviour_logprobs=behavior,
        num_online=1,
    )
    ratios = row(2, 4 / 7, 4 / 7, 4 / 7)
    torch.testing.assert_close(4 * weights, ratios)


def test_groups_of_online_samples_have_ratio_1(assert_close):
    scores, logprobs, ref, behavior = torch.randn(4, 2, 5, dtype=torch.double)
    settings = {"kl_coef": 0.1, "step_coef": 0.2}
    mixed = sample_weights(
        scores, logprobs, ref, behaviour_logprobs=behavior, num_online=5, **settings
    )
    assert_close(mixed, sample_weights(scores, logprobs, ref, **settings), 1e-12)


def test_a_row_sums_to_the_mean_of_its_bounded_ratios(assert_close):
    scores, logprobs, ref, behavior = torch.randn(4, 3, 4, dtype=torch.double)
    for num_online, max_ratio in itertools.product([None, 0, 1, 3], [None, 0.9, 2.0]):
        online = num_online or 0
        mixture = (online * logprobs.exp() + (4 - online) * behavior.exp()) / 4
        rho = logprobs.exp() / mixture
        rho = rho if max_ratio is None else rho.clamp(max=max_ratio)
        shaped = ((scores - 0.1 * (logprobs - ref)) / 0.3).exp()
        normalizer = (rho * shaped).sum(-1, keepdim=True) / rho.sum(-1, keepdim=True)
        weights = sample_weights(
            scores,
            logprobs,
            ref,
            kl_coef=0.1,
            step_coef=0.2,
            behaviour_logprobs=behavior,
            num_online=num_online,
            max_ratio=max_ratio,
        )
        assert_close(weights, rho * shaped / normalizer / 4, 1e-12)
        assert_close(weights.sum(-1), rho.mean(-1), 1e-12)


def test_the_optimum_is_a_fixed_point_of_mixed_groups(assert_close):
    """With one sample of the policy and two of another, the expected target is the policy."""
    optimum = (REF.log() + SCORES).softmax(-1)
    other = torch.tensor([0.1, 0.6, 0.3], dtype=torch.double)
    target = torch.zeros(3, dtype=torch.double)
    for group in map(list, itertools.product(range(3), repeat=3)):
        prob = optimum[group[0]] * other[group[1]] * other[group[2]]
        weights = weights_of(
            SCORES[group],
            optimum.log()[group],
            REF.log()[group],
            kl_coef=1.0,
            step_coef=2.0,
            behaviour_logprobs=other.log()[group].unsqueeze(0),
            num_online=1,
        )
        target.index_add_(0, torch.tensor(group), prob * weights)
    assert_close(target, optimum, 1e-12)


def test_the_gradient_is_policy_minus_target(assert_close):
    logits = torch.tensor([0.2, -0.1, 0.4, 0], dtype=torch.double, requires_grad=True)
    logprobs = logits.log_softmax(-1)[[0, 2, 2, 3]].unsqueeze(0)
    weights = sample_weights(
        row(1, 0.2, 0.2, -0.5), logprobs, logprobs, kl_coef=0.25, step_coef=0.25
    )
    assert not weights.requires_grad
    loss = -(weights * logprobs).sum()
    loss.backward()
    assert loss.item() == pytest.approx(1.28126761)
    assert_close(logits.grad, [-0.42347291, 0.19593432, 0.04524901, 0.18228958], 1e-8)


def test_weights_ignore_a_shift_of_all_scores_of_a_prompt(assert_close):
    scores, logprobs, ref = torch.randn(3, 2, 4, dtype=torch.double)
    settings = {"kl_coef": 0.1, "step_coef": 0.2}
    shifted = sample_weights(scores + row(7).T, logprobs, ref, **settings)
    assert_close(shifted, sample_weights(scores, logprobs, ref, **settings), 1e-12)


def test_summed_log_probs_of_long_texts_do_not_overflow():
    logprobs, behavior = torch.tensor([[-900.0, -1500.0]]), torch.tensor([[-1400.0, -1000.0]])
    for num_online in (0, 1, 2):
        weights = sample_weights(
            torch.tensor([[3.0, -80.0]]),
            logprobs,
            logprobs - 5,
            kl_coef=0.1,
            step_coef=0.1,
            behaviour_logprobs=behavior,
            num_online=num_online,
            max_ratio=2.0,
        )
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()


@pytest.mark.parametrize("num_online", [-1, 3])
def test_num_online_must_be_between_0_and_the_group_size(num_online):
    x = row(0, 0)
    with pytest.raises(ValueError, match=f"num_online must be between 0 and 2, found {num_online}"):
        sample_weights(
            x, x, x, kl_coef=0.1, step_coef=0.1, behaviour_logprobs=x, num_online=num_online
        )

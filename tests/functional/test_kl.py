"""The three estimators of a KL divergence."""

import pytest
import torch

from lit_align.functional.kl import k1, k2, k3

POLICY = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
KL = (POLICY * (POLICY / REFERENCE).log()).sum()


def test_estimates_at_half_the_probability_of_the_reference():
    """They are -log 2, (log 2)^2 / 2 and 2 - log 2 - 1."""
    logprobs, ref = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    assert k1(logprobs, ref).item() == pytest.approx(-0.6931472)
    assert k2(logprobs, ref).item() == pytest.approx(0.2402265)
    assert k3(logprobs, ref).item() == pytest.approx(0.3068528)


@pytest.mark.parametrize("estimate", [k1, k3])
def test_k1_and_k3_are_unbiased(estimate):
    expected = (POLICY * estimate(POLICY.log(), REFERENCE.log())).sum()
    assert expected.item() == pytest.approx(KL.item(), rel=1e-12)


def test_the_expected_gradient_of_k2_is_the_gradient_of_the_kl():
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - REFERENCE.log())).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    sampled = (POLICY * k2(logprobs, REFERENCE.log())).sum()
    (actual,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_gradients_agree_with_finite_differences(estimate):
    inputs = [torch.randn(2, 3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(estimate, inputs)


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_equal_policies_have_a_kl_of_exactly_0(estimate):
    logprobs = torch.randn(4, 5)
    assert (estimate(logprobs, logprobs.clone()) == 0).all()


def test_k2_and_k3_are_never_negative():
    logprobs = torch.randn(1000)
    ref = logprobs + 1e-4 * torch.randn(1000)
    assert (k2(logprobs, ref) >= 0).all()
    assert (k3(logprobs, ref) >= 0).all()


def test_large_log_ratios_are_not_clamped():
    assert k1(torch.tensor(0.0), torch.tensor(-50.0)) == 50
    assert k2(torch.tensor(0.0), torch.tensor(-50.0)) == 1250


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_estimates_agree_with_openrlhf(assert_close, golden, estimate):
    file = golden("openrlhf_misc")
    assert_close(estimate(file["logp"], file["ref_logp"]), file.cases[estimate.__name__])


def test_k1_agrees_with_torchtune(assert_close, golden):
    file = golden("torchtune_rewards")
    assert_close(k1(file["old_logp"], file["ref_logp"]), file.cases["kl_coeff=0.05"]["kl"])

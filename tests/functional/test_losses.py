"""Losses per element: numbers by hand, and agreement with other libraries."""

import math

import pytest
import torch

from lit_align.functional.kl import k3
from lit_align.functional.losses import (
    bradley_terry,
    clipped_surrogate,
    clipped_value,
    dpo,
    ipo,
)
from lit_align.functional.masks import masked_mean

PAIR = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def grad(loss, x):
    return torch.autograd.grad(loss, x)[0]


def mean_of_rows(loss, mask):
    """Return the mean over rows of the mean over their tokens."""
    return (torch.where(mask, loss, 0).sum(-1) / mask.sum(-1)).mean()


def numbers(name):
    """Return the values of 'a=1,b=2' as floats."""
    return [float(part.split("=")[1]) for part in name.split(",")]


def test_the_ratio_is_clipped_below_and_above():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    loss = clipped_surrogate(ratio.log(), torch.zeros(6), advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.3, 0.8, 1.0, 1.5]))


def test_the_gradient_at_ratio_1_is_the_gradient_of_reinforce():
    logprobs = torch.randn(4, 1, requires_grad=True)
    advantages = torch.randn(4, 1)
    loss = clipped_surrogate(logprobs, logprobs.detach(), advantages)
    torch.testing.assert_close(grad(loss.sum(), logprobs), -advantages)


def test_a_clipped_element_has_no_gradient():
    logprobs = torch.tensor([1.0, -1.0], requires_grad=True)
    loss = clipped_surrogate(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]))
    assert grad(loss.sum(), logprobs).tolist() == [0, 0]


def test_the_value_is_clipped_around_the_old_value():
    """From 0 to a return of 1: 0.1 loses (1 - 0.1)^2 / 2 and 0.5 loses (1 - 0.2)^2 / 2."""
    loss = clipped_value(torch.tensor([0.1, 0.5]), torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(loss, torch.tensor([0.405, 0.32]))


def test_preference_losses_at_margins_of_0_and_1():
    """A margin of 0 loses log 2; a margin of 10 nats at beta 0.1 loses log(1 + 1/e)."""
    zero, ten = torch.zeros(2), torch.tensor([0.0, 10.0])
    expected = torch.tensor([math.log(2), math.log1p(math.exp(-1))])
    torch.testing.assert_close(dpo(ten, zero, zero, zero), expected)
    torch.testing.assert_close(bradley_terry(ten / 10, zero), expected)


@pytest.mark.parametrize("loss", [dpo, ipo])
def test_label_smoothing_mixes_both_directions(loss):
    sides = torch.randn(4, 3)
    right, wrong = loss(*sides), loss(sides[1], sides[0], sides[3], sides[2])
    torch.testing.assert_close(loss(*sides, label_smoothing=0.25), 0.75 * right + 0.25 * wrong)


def test_ipo_is_the_squared_distance_from_its_target():
    """The target at beta 0.1 is 5 nats, so that 0, 5 and 7 nats lose 25, 0 and 4."""
    differences = torch.tensor([0.0, 5.0, 7.0])
    assert ipo(differences, *torch.zeros(3, 3)).tolist() == [25.0, 0.0, 4.0]
    assert ipo(*torch.zeros(2, 3), torch.zeros(3), differences).tolist() == [25.0, 0.0, 4.0]


def test_label_smoothing_shrinks_the_target_of_ipo():
    """With correct labels of probability p, the target is (p - (1 - p)) / (2 beta) = 0.6 / 0.4."""
    h = torch.tensor(1.5, dtype=torch.double, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.double)
    assert grad(ipo(h, *zero, beta=0.2, label_smoothing=0.2), h).item() == pytest.approx(0)
    assert grad(ipo(h, *zero, beta=0.2), h).item() == pytest.approx(2 * (1.5 - 2.5))


def test_a_margin_is_subtracted_from_the_lead():
    chosen, rejected, margin = torch.randn(3, 5)
    assert torch.equal(
        bradley_terry(chosen, rejected, margin), bradley_terry(chosen - rejected, margin)
    )


def test_large_differences_stay_finite():
    far = torch.tensor([1e4, -1e4])
    assert bradley_terry(far, torch.zeros(2)).tolist() == [0, 1e4]
    assert dpo(far, -far, far, far, beta=1.0).tolist() == [0, 2e4]


@pytest.mark.parametrize(
    ("function", "num_inputs"),
    [(clipped_surrogate, 3), (clipped_value, 3), (dpo, 4), (ipo, 4), (bradley_terry, 2)],
)
def test_gradients_agree_with_finite_differences(function, num_inputs):
    inputs = [0.3 * torch.randn(6, dtype=torch.double) for _ in range(num_inputs)]
    inputs[0].requires_grad_()
    assert function(*inputs).dtype == torch.double
    assert torch.autograd.gradcheck(function, inputs)


class TestReMaxReductions:
    """Sums and means over tokens weigh short and long responses differently (arXiv:2310.10505)."""

    def test_sum_and_mean_over_tokens(self):
        loss = -0.7 * torch.tensor([[-0.4, -0.8, -0.2]])
        assert loss.sum().item() == pytest.approx(0.98)
        mean = masked_mean(loss, torch.ones(1, 3, dtype=torch.bool))
        assert mean.item() == pytest.approx(0.3266667)

    def test_a_token_mean_can_reverse_the_order_of_a_short_and_a_long_response(self):
        logprobs = torch.tensor([[-1.0, 0.0, 0.0], [-0.5, -0.5, -0.5]])
        mask = torch.tensor([[True, False, False], [True, True, True]])
        loss = -torch.tensor([[1.0], [-1.0]]) * logprobs
        per_row = torch.stack(
            [masked_mean(row, real) for row, real in zip(loss, mask, strict=True)]
        )
        assert (loss * mask).sum().item() / 2 == -0.25
        assert masked_mean(loss, mask).item() == -0.125
        assert per_row.mean().item() == 0.25


BY_TOKEN = [(True, masked_mean), (False, mean_of_rows)]


@pytest.mark.parametrize(("token_level", "mean"), BY_TOKEN)
@pytest.mark.parametrize(("source", "high"), [("logp", 0.2), ("logp", 0.28), ("logp_wild", 0.28)])
def test_the_policy_loss_agrees_with_openrlhf(
    assert_close, golden, source, high, token_level, mean
):
    file = golden("openrlhf_policy_loss")
    wild = "logp_wild," if source == "logp_wild" else ""
    case = file.cases[f"ppo,{wild}low=0.2,high={high},dual_clip=None,token_level={token_level}"]
    logprobs = file[source].requires_grad_()
    loss = mean(clipped_surrogate(logprobs, file["old_logp"], file["adv"], 0.2, high), file.mask)
    assert_close(loss, case["loss"])
    assert_close(grad(loss, logprobs), case["grad_logp"])


def test_the_policy_loss_of_sequences_agrees_with_openrlhf(assert_close, golden):
    """GSPO has one ratio per response, from the mean log-ratio, and one advantage."""
    file = golden("openrlhf_policy_loss")
    case = file.cases["gspo,low=0.2,high=0.28,adv=adv_seq"]
    logprobs = file["logp"].requires_grad_()
    lengths = file.mask.sum(-1, keepdim=True)
    new, old = (
        torch.where(file.mask, x, 0).sum(-1, keepdim=True) / lengths
        for x in (logprobs, file["old_logp"])
    )
    loss = clipped_surrogate(new, old, file["adv_seq"].unsqueeze(-1), 0.2, 0.28).mean()
    assert_close(loss, case["loss"])
    assert_close(grad(loss, logprobs), case["grad_logp"])


@pytest.mark.parametrize("name", ["epsilon=0.2,value_clip=0.2", "epsilon=0.1,value_clip=0.5"])
def test_both_clipped_losses_agree_with_torchtune(assert_close, golden, name):
    file = golden("torchtune_ppo_loss")
    case = next(case for key, case in file.cases.items() if key.startswith(name))
    epsilon, clip = numbers(name)
    logprobs, values = file["logp"].requires_grad_(), file["new_values"].requires_grad_()
    policy = clipped_surrogate(logprobs, file["old_logp"], file["adv"], epsilon, epsilon)
    policy_loss = masked_mean(policy, file.mask)
    assert_close(policy_loss, case["policy_loss"])
    assert_close(grad(policy_loss, logprobs), case["grad_logp"])
    value = masked_mean(clipped_value(values, file["values"], file["returns"], clip), file.mask)
    assert_close(value, case["value_loss"])


@pytest.mark.parametrize(("token_level", "mean"), BY_TOKEN)
@pytest.mark.parametrize("clip", ["None", "0.2", "0.5"])
def test_the_value_loss_agrees_with_openrlhf(assert_close, golden, clip, token_level, mean):
    """Our loss without a clip is the loss with an infinite one."""
    file = golden("openrlhf_value_loss")
    case = file.cases[f"clip={clip},token_level={token_level}"]
    values = file["new_values"].requires_grad_()
    bound = math.inf if clip == "None" else float(clip)
    loss = mean(clipped_value(values, file["values"], file["returns"], bound), file.mask)
    assert_close(loss, case["loss"])
    assert_close(grad(loss, values), case["grad_new_values"])


def test_the_loss_of_grpo_agrees_with_torchtune(assert_close, golden):
    file = golden("torchtune_grpo_loss")
    case = file.cases["GRPOLoss,epsilon=0.2,kl=0.1"]
    logprobs = file["logp"].requires_grad_()
    surrogate = clipped_surrogate(logprobs, file["old_logp"], file["adv_seq"].unsqueeze(-1))
    kl = k3(logprobs, file["ref_logp"])
    loss = masked_mean(surrogate + 0.1 * kl, file.mask)
    assert_close(masked_mean(kl, file.mask), case["kl"])
    assert_close(loss, case["loss"])
    assert_close(grad(loss, logprobs), case["grad_logp"])

    case = file.cases[
        "GRPOSimpleLoss,epsilon=0.2,kl=0.1"
    ]  # ratio 1, mean over the tokens of each response
    surrogate = clipped_surrogate(logprobs, logprobs.detach(), file["adv_seq"].unsqueeze(-1))
    loss = mean_of_rows(surrogate + 0.1 * k3(logprobs, file["ref_logp"]), file.mask)
    assert_close(loss, case["loss"])
    assert_close(grad(loss, logprobs), case["grad_logp"])


@pytest.mark.parametrize(
    "name",
    [
        "beta=0.1,label_smoothing=0.0",
        "beta=0.5,label_smoothing=0.0",
        "beta=0.1,label_smoothing=0.1",
    ],
)
def test_dpo_agrees_with_its_released_code_torchtune_and_openrlhf(assert_close, golden, name):
    beta, label_smoothing = numbers(name)
    for source, suffix, loss_key, grad_key in (
        ("dpo_reference", ",ipo=False,reference_free=False", "mean", "_of_mean"),
        ("torchtune_dpo_loss", "", "mean", "_of_mean"),
        ("openrlhf_dpo_loss", ",ipo=False", "loss", ""),
    ):
        file = golden(source)
        case = file.cases[name + suffix]
        sides = [file[side] for side in PAIR]
        sides[0].requires_grad_()
        losses = dpo(*sides, beta, label_smoothing)
        assert_close(losses, case.get("losses", losses))
        assert_close(losses.mean(), case[loss_key])
        assert_close(grad(losses.mean(), sides[0]), case[f"grad_policy_chosen{grad_key}"])


@pytest.mark.parametrize(
    ("source", "suffix", "loss_key", "grad_key"),
    [
        ("dpo_reference", ",reference_free=False", "mean", "_of_mean"),
        ("openrlhf_dpo_loss", "", "loss", ""),
    ],
)
def test_ipo_agrees_with_the_released_code_of_dpo_and_openrlhf(
    assert_close, golden, source, suffix, loss_key, grad_key
):
    file = golden(source)
    case = file.cases["beta=0.1,label_smoothing=0.0,ipo=True" + suffix]
    sides = [file[side] for side in PAIR]
    sides[0].requires_grad_()
    losses = ipo(*sides, 0.1)
    assert_close(losses, case.get("losses", losses))
    assert_close(losses.mean(), case[loss_key])
    assert_close(grad(losses.mean(), sides[0]), case[f"grad_policy_chosen{grad_key}"])


@pytest.mark.parametrize(
    ("name", "given"),
    [("PairWiseLoss,margin=None", []), ("PairWiseLoss,margin=given", ["margin"]),
     ("LogExpLoss,margin=None", [])],
)  # fmt: skip
def test_bradley_terry_agrees_with_openrlhf(assert_close, golden, name, given):
    file = golden("openrlhf_reward_model_loss")
    case = file.cases[name]
    chosen = file["chosen_reward"].requires_grad_()
    given = [file[part] for part in given]
    loss = bradley_terry(chosen, file["rejected_reward"], *given).mean()
    assert_close(loss, case["loss"])
    assert_close(grad(loss, chosen), case["grad_chosen_reward"])

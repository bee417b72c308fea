"""Losses per element, to be minimised: tensors of equal shape in, the same shape out, no mean."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """[..] PPO's pessimistic policy loss, arXiv:1707.06347 eq. 7.

    Of tokens [N, R], or of whole responses [N, 1] with summed or averaged log-probs.

    Args:
        logprobs: [..] nats, under the policy being trained.
        old_logprobs: [..] nats, under the policy that sampled.
        advantages: [..] credit of each element.
        clip_low: How far below 1 the ratio still earns.
        clip_high: How far above 1 the ratio still earns; larger than clip_low in DAPO.
    """
    ratio = (logprobs - old_logprobs).clamp(max=80.0).exp()  # an infinite ratio has no gradient
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages)


def clip_fractions(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Return where the clip of `clipped_surrogate` removes the gradient, below and above.

    Two bool tensors [..], of which the means over a mask are the clip fractions. A ratio below the
    range is clipped only if the advantage is negative, a ratio above it only if it is positive
    (arXiv:1707.06347 eq. 7, figure 1).

    Args:
        logprobs: [..] nats, under the policy being trained.
        old_logprobs: [..] nats, under the policy that sampled.
        advantages: [..] advantage of each element.
        clip_low: Lower clip range of the ratio.
        clip_high: Upper clip range of the ratio.

    Example:
        >>> ratio = torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0])
        >>> advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0])
        >>> low, high = clip_fractions(ratio.log(), torch.zeros(5), advantages)
        >>> low.tolist(), high.tolist()
        ([True, False, False, False, False], [False, False, False, False, True])
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return low, high


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """[..] PPO's pessimistic value loss: half the larger of the plain and clipped squared errors.

    Args:
        values: [..] of the critic being trained.
        old_values: [..] of the critic at the time of sampling.
        returns: [..] what the values should have been.
        clip: How far a value may move from its old one and still earn.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """[B] direct preference optimisation, arXiv:2305.18290 eq. 7.

    Args:
        policy_chosen: [B] nats, summed over the chosen response's tokens, under the policy.
        policy_rejected: [B] nats, the same of the rejected response.
        ref_chosen: [B] nats, the chosen response under the reference.
        ref_rejected: [B] nats, the rejected response under the reference.
        beta: Implicit reward per nat; a larger one stays closer to the reference.
        label_smoothing: Probability that a preference is the wrong way round (conservative DPO).
    """
    margin = beta * ((policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """[B] identity preference optimisation, arXiv:2310.12036 eq. 17.

    The squared distance of the log-ratios' difference from 1 / (2 beta), in nats^2. TRL's takes
    log-probs per token instead of sums.

    Args:
        policy_chosen: [B] nats, summed over the chosen response's tokens, under the policy.
        policy_rejected: [B] nats, the same of the rejected response.
        ref_chosen: [B] nats, the chosen response under the reference.
        ref_rejected: [B] nats, the rejected response under the reference.
        beta: The paper's tau; a larger one stays closer to the reference.
        label_smoothing: Probability that a preference is the wrong way round.
    """
    margin = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    right, wrong = (margin - 1 / (2 * beta)).square(), (margin + 1 / (2 * beta)).square()
    return (1 - label_smoothing) * right + label_smoothing * wrong


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """[B] -log P(chosen beats rejected) of a reward model, arXiv:2203.02155 eq. 1.

    Args:
        chosen: [B] scores of the chosen responses.
        rejected: [B] scores of the rejected responses.
        margin: [B] by how much the chosen score should win, arXiv:2307.09288 eq. 2.
    """
    gap = chosen - rejected
    return -F.logsigmoid(gap if margin is None else gap - margin)

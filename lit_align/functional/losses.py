"""Losses per element, to be minimized.

The inputs have equal shapes and the loss has the same shape. No function takes a mean.
"""

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
    """Return the clipped policy loss of PPO [..], arXiv:1707.06347 eq. 7.

    The elements are tokens [N, R], or responses [N, 1] with summed or averaged log-probs.

    Args:
        logprobs: [..] nats, under the policy being trained.
        old_logprobs: [..] nats, under the policy that sampled.
        advantages: [..] advantage of each element.
        clip_low: Clip range of the importance ratio below 1.
        clip_high: Clip range of the importance ratio above 1; DAPO uses a larger one than below.

    Example:
        >>> ratio = torch.tensor([0.5, 2.0])
        >>> clipped_surrogate(ratio.log(), torch.zeros(2), torch.ones(2), clip_high=0.25)
        tensor([-0.5000, -1.2500])
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
    """Return two bool tensors [..]: the elements clipped below and above by `clipped_surrogate`.

    Their means over a mask are the clip fractions. A ratio below the range is clipped only if the
    advantage is negative, a ratio above it only if the advantage is positive (arXiv:1707.06347
    eq. 7, figure 1).

    Args:
        logprobs: [..] nats, under the policy being trained.
        old_logprobs: [..] nats, under the policy that sampled.
        advantages: [..] advantage of each element.
        clip_low: Clip range of the importance ratio below 1.
        clip_high: Clip range of the importance ratio above 1.

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
    """Return the clipped value loss of PPO [..], as in TRL and OpenRLHF.

    It is half the larger of two squared errors, of the value and of the clipped value.

    Args:
        values: [..] predictions of the critic being trained.
        old_values: [..] predictions of the critic during the rollout.
        returns: [..] targets of the critic.
        clip: Clip range of the value around its old value.

    Example:
        >>> clipped_value(torch.tensor([0.25, 1.0]), torch.zeros(2), torch.ones(2), 0.5).tolist()
        [0.28125, 0.125]
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
    """Return the loss of direct preference optimization [B], arXiv:2305.18290 eq. 7.

    Args:
        policy_chosen: [B] nats, summed over the tokens of the chosen response, under the policy.
        policy_rejected: [B] nats, summed over the rejected response, under the policy.
        ref_chosen: [B] nats, the chosen response under the reference.
        ref_rejected: [B] nats, the rejected response under the reference.
        beta: Implicit reward per nat. A larger beta keeps the policy closer to the reference.
        label_smoothing: Probability that a preference label is wrong (conservative DPO).

    Example:
        >>> zeros = torch.zeros(2)
        >>> dpo(torch.tensor([0.0, 10.0]), zeros, zeros, zeros)  # log 2 and log(1 + 1/e)
        tensor([0.6931, 0.3133])
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
    """Return the loss of identity preference optimization [B], arXiv:2310.12036 eq. 17.

    It is (h - 1 / (2 beta))^2 in nats^2, where h is the difference of the log-ratios. TRL divides
    the log-probs by the number of tokens.

    Args:
        policy_chosen: [B] nats, summed over the tokens of the chosen response, under the policy.
        policy_rejected: [B] nats, summed over the rejected response, under the policy.
        ref_chosen: [B] nats, the chosen response under the reference.
        ref_rejected: [B] nats, the rejected response under the reference.
        beta: tau in the paper; a larger one stays closer to the reference.
        label_smoothing: Probability that a preference label is wrong.

    Example:
        >>> ipo(torch.tensor([2.0]), *torch.zeros(3, 1), beta=0.1).tolist()  # (2 - 5)^2
        [9.0]
    """
    margin = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    right, wrong = (margin - 1 / (2 * beta)).square(), (margin + 1 / (2 * beta)).square()
    return (1 - label_smoothing) * right + label_smoothing * wrong


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Return the loss of a reward model [B], -log P(chosen beats rejected), arXiv:2203.02155 eq. 1.

    Args:
        chosen: [B] scores of the chosen responses.
        rejected: [B] scores of the rejected responses.
        margin: [B] required difference of the two scores, arXiv:2307.09288 eq. 2. None: 0.

    Example:
        >>> bradley_terry(torch.tensor([3.0]).log(), torch.zeros(1))  # -log 3/4
        tensor([0.2877])
    """
    gap = chosen - rejected
    return -F.logsigmoid(gap if margin is None else gap - margin)

"""Rewards, returns and advantages of response tokens.

A score belongs to a whole response, a reward to a token. A return is the discounted sum of the
rewards from a token on. N rows, R response tokens, B prompts, G responses to each prompt. Tokens
outside a mask are skipped as if absent: they are never read, and the result is 0 there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Return rewards [N, R] that hold each score on the last True of its row, 0 elsewhere.

    Args:
        scores: [N] scores of the responses.
        mask: [N, R] bool. A row without True gives zeros, and its score is not read.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> on_last_token(torch.tensor([5.0, 7.0]), mask).tolist()
        [[0.0, 5.0, 0.0], [7.0, 0.0, 0.0]]
    """
    num_remaining = mask.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask & (num_remaining == 1), scores.unsqueeze(-1), 0)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return the returns [N, R], the sums over h >= t of gamma^(h-t) r_h.

    Args:
        rewards: [N, R] rewards of the tokens.
        mask: [N, R] bool. The exponent counts True tokens only.
        gamma: Discount per token; 1 does not discount.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> rewards_to_go(torch.tensor([[1.0, 2.0, 4.0]]), mask, gamma=0.5).tolist()
        [[3.0, 4.0, 4.0]]
    """
    sums = torch.where(mask, rewards, 0)
    decay = torch.ones_like(sums).masked_fill(mask, gamma)
    # A scan in log2(R) steps: sums[:, t] covers the tokens t .. t + span - 1, and span doubles.
    span = 1
    while span < rewards.shape[-1]:
        sums = sums + decay * F.pad(sums[:, span:], (0, span))
        decay = decay * F.pad(decay[:, span:], (0, span))
        span *= 2
    return torch.where(mask, sums, 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages [N, R] and returns [N, R] by GAE, arXiv:1506.02438 eq. 16.

    The value after the last token is 0. The advantages are not whitened, and the returns are
    advantages + values.

    Args:
        rewards: [N, R] rewards of the tokens.
        values: [N, R] predictions of the critic before each token is chosen.
        mask: [N, R] bool.
        gamma: Discount per token; 1 does not discount.
        lam: Lambda: 0 uses one-step errors only, 1 uses full returns.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> advantages, returns = gae(rewards, values, torch.tensor([[True, True]]), lam=0.5)
        >>> advantages.tolist(), returns.tolist()  # errors -0.25 and 0.75
        ([[0.125, 0.75]], [[0.625, 1.0]])
    """
    deltas = rewards + gamma * _next_value(values, mask) - values
    advantages = rewards_to_go(deltas, mask, gamma * lam)
    return advantages, torch.where(mask, advantages + values, 0)


def group_relative(scores: Tensor, scale: bool = True) -> Tensor:
    """Return the advantages [B, G] of GRPO, centered and scaled per group, arXiv:2402.03300 4.1.2.

    A group of equal scores gets advantages of exactly 0.

    Args:
        scores: [B, G] scores, the responses to one prompt in a row.
        scale: Divide by the unbiased standard deviation + 1e-6. Dr. GRPO (arXiv:2503.20783) does
            not.

    Example:
        >>> group_relative(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]), scale=False).tolist()
        [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    """
    # The rounding of the mean, divided by a tiny deviation, would look like an advantage.
    equal = scores.amax(-1, keepdim=True) == scores.amin(-1, keepdim=True)
    centered = torch.where(equal, 0, scores - scores.mean(-1, keepdim=True))
    if not scale:
        return centered
    variance = centered.square().sum(-1, keepdim=True) / max(scores.shape[-1] - 1, 1)
    return centered / (variance.sqrt() + 1e-6)


def leave_one_out(scores: Tensor) -> Tensor:
    """Return the advantages [B, G] of RLOO, arXiv:2402.14740.

    The baseline of a response is the mean score of the other responses to its prompt.

    Args:
        scores: [B, G] scores, G at least 2.

    Example:
        >>> leave_one_out(torch.tensor([[0.0, 2.0, 4.0]])).tolist()
        [[-3.0, 0.0, 3.0]]
    """
    size = scores.shape[-1]
    if size < 2:
        raise ValueError(
            f"leave_one_out needs at least 2 responses per prompt, found {size}. "
            "Use more samples per prompt."
        )
    return group_relative(scores, scale=False) * (size / (size - 1))


def dpo_token_rewards(
    dpo_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    coef: float = 0.05,
    clip: float | None = None,
) -> Tensor:
    """Return the rewards [N, R] of RTO, coef * (log pi_dpo - log pi_ref), arXiv:2404.18922 eq. 4.7.

    Args:
        dpo_logprobs: [N, R] nats, under the DPO policy.
        ref_logprobs: [N, R] nats, under the reference.
        mask: [N, R] bool.
        coef: Reward per nat, beta_1 in the paper. The beta of DPO training is not applied again.
        clip: Bound on the absolute reward of a token, after `coef`. None does not clip, as in the
            paper.

    Example:
        >>> logprobs, mask = torch.tensor([[-1.0, -2.5]]), torch.tensor([[True, True]])
        >>> dpo_token_rewards(logprobs, torch.tensor([[-3.0, -2.0]]), mask, 0.5, 0.75).tolist()
        [[0.75, -0.25]]
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0 or None, found {clip}. Use None to switch it off.")
    active = mask & (coef != 0)  # 0 x inf would be NaN, so coef 0 reads no log-prob
    rewards = coef * torch.where(active, dpo_logprobs - ref_logprobs, 0)
    return rewards if clip is None else rewards.clamp(-clip, clip)


def _next_value(x: Tensor, mask: Tensor) -> Tensor:
    """Return x [N, R] at the next True token after each token, 0 after the last."""
    length = x.shape[-1]
    positions = torch.where(mask, torch.arange(length, device=x.device), length)
    first = positions.flip(-1).cummin(-1).values.flip(-1)
    after = F.pad(first[:, 1:], (0, 1), value=length)
    return F.pad(torch.where(mask, x, 0), (0, 1)).gather(-1, after)

"""From scores and rewards to what each token is worth.

A score belongs to a whole response, a reward to a token, a return is what is still to come.
N rows, R response tokens, B prompts, G responses to each prompt. Tokens outside a mask are
skipped as if absent: never read, 0 in the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """scores [N] -> rewards [N, R]: each on the last True of its row, 0 elsewhere."""
    num_remaining = mask.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask & (num_remaining == 1), scores.unsqueeze(-1), 0)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """[N, R] returns: the sum over h >= t of gamma^(h-t) r_h, counted in True tokens."""
    sums = torch.where(mask, rewards, 0)
    decay = torch.ones_like(sums).masked_fill(mask, gamma)
    span = 1  # sums[:, t] covers the tokens t .. t + span - 1 and doubles: log2(R) steps
    while span < rewards.shape[-1]:
        sums = sums + decay * F.pad(sums[:, span:], (0, span))
        decay = decay * F.pad(decay[:, span:], (0, span))
        span *= 2
    return torch.where(mask, sums, 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv:1506.02438 eq. 16; the value after the end is 0.

    Returns:
        advantages [N, R], not whitened, and returns = advantages + values [N, R].
    """
    deltas = rewards + gamma * _next_value(values, mask) - values
    advantages = rewards_to_go(deltas, mask, gamma * lam)
    return advantages, torch.where(mask, advantages + values, 0)


def group_relative(scores: Tensor, scale: bool = True) -> Tensor:
    """[B, G] -> [B, G] advantages of GRPO: centred and scaled in a group, arXiv:2402.03300 4.1.2.

    Where all scores of a group are equal they are exactly 0, whatever the rounding of their mean.

    Args:
        scores: [B, G], the responses to one prompt side by side.
        scale: Divide by the unbiased standard deviation + 1e-6; off in Dr. GRPO, arXiv:2503.20783.
    """
    equal = scores.amax(-1, keepdim=True) == scores.amin(-1, keepdim=True)
    centred = torch.where(equal, 0, scores - scores.mean(-1, keepdim=True))
    if not scale:
        return centred
    variance = centred.square().sum(-1, keepdim=True) / max(scores.shape[-1] - 1, 1)
    return centred / (variance.sqrt() + 1e-6)


def leave_one_out(scores: Tensor) -> Tensor:
    """[B, G] -> [B, G]: each score minus the mean of its group's others, RLOO, arXiv:2402.14740."""
    size = scores.shape[-1]
    if size < 2:
        raise ValueError(f"leave_one_out needs at least 2 responses per prompt, not {size}")
    return group_relative(scores, scale=False) * (size / (size - 1))


def dpo_token_rewards(
    dpo_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    coef: float = 0.05,
    clip: float | None = None,
) -> Tensor:
    """[N, R] rewards coef * (log pi_dpo - log pi_ref), RTO, arXiv:2404.18922 eq. 4.7.

    Args:
        dpo_logprobs: [N, R] nats, under the DPO policy.
        ref_logprobs: [N, R] nats, under the reference.
        mask: [N, R] bool.
        coef: Reward per nat, the paper's beta_1; the beta of DPO training is not applied again.
        clip: Bound on the size of a token's reward, after `coef`; None is off, as in the paper.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a bound above 0, not {clip}; leave it out to switch it off")
    active = mask & (coef != 0)  # 0 switches it off, whatever it would multiply
    rewards = coef * torch.where(active, dpo_logprobs - ref_logprobs, 0)
    return rewards if clip is None else rewards.clamp(-clip, clip)


def _next_value(x: Tensor, mask: Tensor) -> Tensor:
    """[N, R]: x at the next True token after each, 0 after the last."""
    length = x.shape[-1]
    positions = torch.where(mask, torch.arange(length, device=x.device), length)
    first = positions.flip(-1).cummin(-1).values.flip(-1)
    after = F.pad(first[:, 1:], (0, 1), value=length)
    return F.pad(torch.where(mask, x, 0), (0, 1)).gather(-1, after)

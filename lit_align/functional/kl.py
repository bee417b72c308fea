"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens.

John Schulman's k1, k2 and k3 (joschu.net/blog/kl-approx.html). All are [N, R] -> [N, R], in nats,
not clamped, and nothing in them is detached.
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """logp - ref: unbiased, may be negative. The one to subtract from a reward."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(logp - ref)^2 / 2: biased, never negative; its gradient is that of the KL, in expectation.

    The one to add to a loss, as the gradient of k1 has expectation zero.
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(ref - logp) - (ref - logp) - 1: unbiased and never negative, arXiv:2402.03300 eq. 4."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio

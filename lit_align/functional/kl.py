"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens.

The estimators k1, k2 and k3 of joschu.net/blog/kl-approx.html. They are elementwise, in nats, and
neither clamp nor detach anything.
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the log-ratio logp - ref [N, R] in nats, the estimate to subtract from a reward.

    It is unbiased and may be negative.

    Args:
        logprobs: [N, R] nats, under the policy.
        ref_logprobs: [N, R] nats, under the reference.

    Example:
        >>> k1(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0])).tolist()
        [0.5, -1.0]
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (logp - ref)^2 / 2 [N, R], the estimate to add to a loss.

    It is biased and never negative. Its expected gradient is the gradient of the KL. The expected
    gradient of k1 is zero.

    Args:
        logprobs: [N, R] nats, under the policy.
        ref_logprobs: [N, R] nats, under the reference.

    Example:
        >>> k2(torch.tensor([-1.0, -4.0]), torch.tensor([-1.5, -2.0])).tolist()
        [0.125, 2.0]
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(ref - logp) - (ref - logp) - 1 [N, R] in nats, arXiv:2402.03300 eq. 4.

    It is unbiased and never negative.

    Args:
        logprobs: [N, R] nats, under the policy.
        ref_logprobs: [N, R] nats, under the reference.

    Example:
        >>> k3(torch.tensor([0.25]).log(), torch.tensor([0.5]).log())  # 2 - log 2 - 1
        tensor([0.3069])
    """
    log_ratio = ref_logprobs - logprobs
    # expm1 keeps the digits of nearly equal policies, where exp(x) - 1 would cancel
    return torch.expm1(log_ratio) - log_ratio

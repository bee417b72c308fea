"""Weights of samples in successive policy re-weighting (SPR).

Our reconstruction; the paper is not public (OpenReview LglOy15bqe). B prompts, G samples of each
prompt.
"""

import math

import torch
from torch import Tensor


def sample_weights(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kl_coef: float,
    step_coef: float,
    behaviour_logprobs: Tensor | None = None,
    num_online: int | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    """Return the weights w_i = rho_i exp(ell_i) / (G Z) [B, G] of samples in the SFT loss.

    The SFT target maximizes E[score] - kl_coef KL(pi || ref) - step_coef KL(pi || pi_t). Z is the
    mean of exp(ell) with weights rho. The weights of a prompt sum to its mean rho, the
    importance ratio. They have no gradient.

    Args:
        scores: [B, G] scores.
        logprobs: [B, G] nats, summed over a sample's tokens, under the current policy pi_t.
        ref_logprobs: [B, G] nats, summed, under the reference.
        kl_coef: KL penalty: score subtracted per nat of KL to the reference.
        step_coef: Score that a nat of KL to the current policy costs.
        behaviour_logprobs: [B, G] nats, summed, under the offline sampler mu. None sets rho to 1.
        num_online: Number of samples, in any column, that the policy sampled; None means 0.
        max_ratio: Upper bound of rho; None means no bound.

    Example:
        >>> sample_weights(torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2), torch.zeros(1, 2),
        ...                kl_coef=0.5, step_coef=0.5)  # 3 : 1
        tensor([[0.7500, 0.2500]])
    """
    with torch.no_grad():
        shaped = shaped_scores(scores, logprobs, ref_logprobs, kl_coef, step_coef)
        if behaviour_logprobs is None:
            return shaped.softmax(-1)
        log_rho = log_ratios(logprobs, behaviour_logprobs, num_online or 0)
        log_rho = log_rho if max_ratio is None else log_rho.clamp(max=math.log(max_ratio))
        log_mean_rho = log_rho.logsumexp(-1, keepdim=True) - math.log(scores.shape[-1])
        # Summed log-probs are hundreds of nats, so exp comes last.
        return ((shaped + log_rho).log_softmax(-1) + log_mean_rho).exp()


def shaped_scores(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, step_coef: float
) -> Tensor:
    """Return ell [B, G], the score minus its KL penalty, over kl_coef + step_coef.

    Args:
        scores: [B, G] scores.
        logprobs: [B, G] nats, summed over a sample's tokens, under the current policy.
        ref_logprobs: [B, G] nats, summed, under the reference.
        kl_coef: KL penalty: score subtracted per nat of KL to the reference.
        step_coef: Score that a nat of KL to the current policy costs.

    Example:
        >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
        >>> shaped_scores(torch.tensor([[1.0, 0.5]]), logprobs, ref_logprobs, 0.25, 0.25).tolist()
        [[1.5, 1.0]]
    """
    return (scores - kl_coef * (logprobs - ref_logprobs)) / (kl_coef + step_coef)


def log_ratios(logprobs: Tensor, behaviour_logprobs: Tensor, num_online: int) -> Tensor:
    """Return log(pi_t / q) [B, G] in nats, q = (num_online pi_t + (G - num_online) mu) / G.

    Args:
        logprobs: [B, G] nats, summed over a sample's tokens, under the current policy pi_t.
        behaviour_logprobs: [B, G] nats, summed, under the sampler mu of the offline samples.
        num_online: Number of samples that the policy sampled, 0 to G.

    Example:
        >>> policy, behavior = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.2, 0.8]])
        >>> log_ratios(policy.log(), behavior.log(), num_online=1).exp()  # q = 0.4 and 0.6
        tensor([[1.5000, 0.6667]])
    """
    size = logprobs.shape[-1]
    if not 0 <= num_online <= size:
        raise ValueError(
            f"num_online must be between 0 and {size}, found {num_online}. "
            "Set it to the number of samples from the policy."
        )
    online = logprobs.new_full((), num_online / size).log()
    offline = logprobs.new_full((), (size - num_online) / size).log()
    return -torch.logaddexp(online, offline + behaviour_logprobs - logprobs)


def log_normalizer(shaped: Tensor, log_rho: Tensor) -> Tensor:
    """Return log Z [B], the log of the mean of exp(ell) with weights rho.

    Args:
        shaped: [B, G] ell of `shaped_scores`.
        log_rho: [B, G] log of rho, after the bound.

    Example:
        >>> shaped, log_rho = torch.tensor([[1.0, 5.0]]).log(), torch.tensor([[3.0, 1.0]]).log()
        >>> round(log_normalizer(shaped, log_rho).exp().item(), 4)  # (3 x 1 + 1 x 5) / (3 + 1)
        2.0
    """
    return (shaped + log_rho).logsumexp(-1) - log_rho.logsumexp(-1)


def effective_sample_fraction(weights: Tensor) -> Tensor:
    """Return the effective sample size over G [B], (sum w)^2 / (G sum w^2).

    1 means equal weights, and 1 / G means that one sample has all the weight.

    Args:
        weights: [B, G] weights of `sample_weights`.

    Example:
        >>> effective_sample_fraction(torch.tensor([[0.5, 0.5, 0.0, 0.0]])).tolist()
        [0.5]
    """
    fractions = weights / weights.sum(-1, keepdim=True)
    return 1 / (weights.shape[-1] * fractions.square().sum(-1))

"""Weights of samples in successive policy re-weighting (SPR, our reconstruction of the method)."""

import math

import torch
from torch import Tensor


@torch.no_grad()
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
    """[B, G] weights w_i = rho_i exp(ell_i) / (G Z) of a group's samples in the SFT loss.

    They lead from the policy pi_t to the maximiser of
    E[score] - kl_coef KL(pi || ref) - step_coef KL(pi || pi_t), pi_t exp(ell) / Z, where
    ell = (score - kl_coef (log pi_t - log ref)) / (kl_coef + step_coef) and Z is estimated by
    sum_j rho_j exp(ell_j) / sum_j rho_j. A row sums to the mean of its rho. No gradient.

    Args:
        scores: [B, G], the samples of one prompt side by side.
        logprobs: [B, G] nats, summed over a sample's tokens, under the current policy pi_t.
        ref_logprobs: [B, G] nats, summed, under the reference.
        kl_coef: Score lost per nat of KL to the reference.
        step_coef: Score lost per nat of KL to the current policy.
        behaviour_logprobs: [B, G] nats, summed, under mu that drew the offline samples; without
            it all samples are the policy's own and rho is 1.
        num_online: How many of the G samples, in any column, are the policy's own; none if absent.
        max_ratio: Cap on rho; none if absent.
    """
    shaped = shaped_scores(scores, logprobs, ref_logprobs, kl_coef, step_coef)
    if behaviour_logprobs is None:
        return shaped.softmax(-1)
    log_rho = log_ratios(logprobs, behaviour_logprobs, num_online or 0)
    if max_ratio is not None:
        log_rho = log_rho.clamp(max=math.log(max_ratio))
    log_mean_rho = log_rho.logsumexp(-1, keepdim=True) - math.log(scores.shape[-1])
    return ((shaped + log_rho).log_softmax(-1) + log_mean_rho).exp()


def shaped_scores(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, step_coef: float
) -> Tensor:
    """[B, G] ell: the score less the price of the nats above the reference, over kl + step."""
    return (scores - kl_coef * (logprobs - ref_logprobs)) / (kl_coef + step_coef)


def log_ratios(logprobs: Tensor, behaviour_logprobs: Tensor, num_online: int) -> Tensor:
    """[B, G] log of pi_t / q, q = (num_online pi_t + (G - num_online) mu) / G, who drew them."""
    size = logprobs.shape[-1]
    if not 0 <= num_online <= size:
        raise ValueError(f"num_online {num_online} must lie between 0 and the {size} samples")
    online = logprobs.new_full((), num_online / size).log()
    offline = logprobs.new_full((), (size - num_online) / size).log()
    return -torch.logaddexp(online, offline + behaviour_logprobs - logprobs)


def log_normalizer(shaped: Tensor, log_rho: Tensor) -> Tensor:
    """[B] log Z of ell and of rho as it is capped, both [B, G]."""
    return (shaped + log_rho).logsumexp(-1) - log_rho.logsumexp(-1)


def effective_sample_fraction(weights: Tensor) -> Tensor:
    """[B]: how many of the G samples share the weight evenly, 1 / sum of squares, over G."""
    fractions = weights / weights.sum(-1, keepdim=True)
    return 1 / (weights.shape[-1] * fractions.square().sum(-1))

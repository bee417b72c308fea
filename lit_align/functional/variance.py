"""Reward variance increase: the same mean and order of a group's scores, further apart."""

import torch
import torch.nn.functional as F
from torch import Tensor


def increase_variance(
    scores: Tensor, probs: Tensor, low: float, high: float, split_ties: bool = False
) -> Tensor:
    """[B, G] -> [B, G] scores of the largest variance with the same mean and order.

    GRPOVI, arXiv:2505.23247: maximise sum_i p_i z_i^2 over z in [low, high] that keep the order of
    the scores and sum_i p_i z_i. The maximiser, in closed form: `high` for the best of a group,
    `low` for the rest, one value in between where the mean demands it. Mean and variance are
    weighted by `probs`. Computed in float64.

    Args:
        scores: [B, G], the responses to one prompt side by side; clipped to [low, high].
        probs: [B, G] reference probabilities, summing to 1 in each group; may be 0.
        low: Least possible score.
        high: Largest possible score; at or below `low` the scores come back as they are.
        split_ties: Rank equal scores by column, the first highest, instead of treating them alike.
    """
    if high <= low:
        return scores
    ranked, order = scores.double().clamp(low, high).sort(dim=-1, descending=True, stable=True)
    mass = probs.double().gather(-1, order).cumsum(-1)
    mass = F.pad(mass.cummax(-1).values, (1, 0))  # a parallel sum need not be monotone
    above, through = (mass[:, :-1], mass[:, 1:]) if split_ties else _tied_mass(ranked, mass)

    # The mean, summed by parts: exactly a sum of leading probs where scores are `low` or `high`.
    height = (ranked - low) / (high - low)
    steps = height - F.pad(height[:, 1:], (0, 1))
    mean = (steps * mass[:, 1:]).sum(-1, keepdim=True)

    fraction = ((mean - above) / (through - above)).clamp(0, 1)
    spread = (low * (1 - fraction) + high * fraction).clamp(low, high)
    spread = torch.where(fraction.isnan(), ranked, spread)  # no weight, and just where high ends
    return torch.empty_like(spread).scatter(-1, order, spread).to(scores.dtype)


def _tied_mass(ranked: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G] each: probability of all higher scores, and of all scores at least as high."""
    new = F.pad(ranked[:, 1:] < ranked[:, :-1], (1, 0), value=True)  # the first of equal scores
    above = torch.where(new, mass[:, :-1], 0).cummax(-1).values
    final = F.pad(new[:, 1:], (0, 1), value=True)
    through = torch.where(final, mass[:, 1:], torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return above, through

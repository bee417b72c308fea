"""Reward variance increase: the same mean and order of a group's scores, further apart."""

import torch
import torch.nn.functional as F
from torch import Tensor


def increase_variance(
    scores: Tensor, probs: Tensor, low: float, high: float, split_ties: bool = False
) -> Tensor:
    """Return the scores [B, G] of the largest variance with the same mean and order.

    GRPOVI, arXiv:2505.23247: maximize sum_i p_i z_i^2 over z in [low, high] that keep the order of
    the scores and sum_i p_i z_i. In closed form the best scores of a group become `high`, the rest
    `low`, and at most one distinct score is between them. Computed in float64.

    Args:
        scores: [B, G] scores, clipped to [low, high].
        probs: [B, G] reference probabilities, with a sum of 1 in each group; may be 0.
        low: Smallest possible score.
        high: Largest possible score; at or below `low` the scores are returned unchanged.
        split_ties: Rank equal scores by column, first highest. False keeps them equal.

    Example:
        >>> scores, probs = torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
        >>> increase_variance(scores, probs, low=0.0, high=1.0).tolist()  # mean 0.5
        [[1.0, 0.5, 0.0]]
    """
    if high <= low:
        return scores
    ranked, order = scores.double().clamp(low, high).sort(dim=-1, descending=True, stable=True)
    mass = probs.double().gather(-1, order).cumsum(-1)
    mass = F.pad(mass.cummax(-1).values, (1, 0))  # a parallel sum need not be monotone
    above, through = (mass[:, :-1], mass[:, 1:]) if split_ties else _tied_mass(ranked, mass)

    # Sum by parts. Then scores that are all `low` or all `high` stay exact, without a rounded value
    # between.
    height = (ranked - low) / (high - low)
    steps = height - F.pad(height[:, 1:], (0, 1))
    mean = (steps * mass[:, 1:]).sum(-1, keepdim=True)

    fraction = ((mean - above) / (through - above)).clamp(0, 1)
    spread = (low * (1 - fraction) + high * fraction).clamp(low, high)
    # 0 / 0 if the boundary score has probability 0. Such a score is not changed.
    spread = torch.where(fraction.isnan(), ranked, spread)
    return torch.empty_like(spread).scatter(-1, order, spread).to(scores.dtype)


def _tied_mass(ranked: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of all higher, and of all equal or higher scores, [B, G] each."""
    new = F.pad(ranked[:, 1:] < ranked[:, :-1], (1, 0), value=True)  # the first of equal scores
    above = torch.where(new, mass[:, :-1], 0).cummax(-1).values
    final = F.pad(new[:, 1:], (0, 1), value=True)
    through = torch.where(final, mass[:, 1:], torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return above, through

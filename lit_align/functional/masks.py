"""Which tokens are real, and statistics over those alone: what lies outside is never read."""

from collections.abc import Sequence

import torch
from torch import Tensor


def through_first(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """[N, R] bool: True up to and including the first of `stops`; a row without one is all True."""
    is_stop = torch.isin(tokens, tokens.new_tensor(stops))
    return is_stop.cumsum(-1) - is_stop.long() == 0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar: the mean of x [..] over all True of mask [..]; 0 where there is none."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """[N, R]: (x - mean) / sqrt(var + 1e-8) over all True of the batch, 0 outside the mask.

    The variance is unbiased, as in TRL's and verl's PPO.
    """
    centred = torch.where(mask, x - masked_mean(x, mask), 0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centred / (variance + 1e-8).sqrt()

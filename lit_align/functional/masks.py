"""Masks of real tokens, and statistics over the real tokens alone.

Values outside a mask are never read, so they may be NaN or infinite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def through_first(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """Return a bool mask [N, R], True through the first stop token of each row.

    A row without a stop token is all True.

    Args:
        tokens: [N, R] token ids.
        stops: Token ids that end a response.

    Example:
        >>> through_first(torch.tensor([[5, 2, 7], [5, 6, 7]]), stops=[2]).tolist()
        [[True, True, False], [True, True, True]]
    """
    is_stop = torch.isin(tokens, tokens.new_tensor(stops))
    # Count the stops before each token. The first stop has 0 before it, so it is True.
    return is_stop.cumsum(-1) - is_stop.long() == 0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` over all True of `mask` as a scalar, 0 for an empty mask.

    Args:
        x: [..] values of any shape.
        mask: [..] bool of the same shape.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> masked_mean(torch.tensor([[1.0, 5.0], [3.0, torch.nan]]), mask).item()
        3.0
    """
    # where, not a product: 0 x NaN outside the mask would be NaN
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) [N, R] over all True of the batch, 0 elsewhere.

    The variance is unbiased, as in the PPO of TRL and verl.

    Args:
        x: [N, R] values.
        mask: [N, R] bool.

    Example:
        >>> whiten(torch.tensor([[0.0, 4.0, 8.0]]), torch.tensor([[True, True, True]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """
    centered = torch.where(mask, x - masked_mean(x, mask), 0)
    variance = centered.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centered / (variance + 1e-8).sqrt()

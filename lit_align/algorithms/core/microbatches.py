"""Results of micro-batches, put together in the order of their batch."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad


def join_microbatches(parts: Iterable[Tensor], rows: list[list[int]], width: int) -> Tensor:
    """Join one result of all micro-batches into [N, R] or [N], padded with 0.

    Args:
        parts: [n, r] or [n] of each micro-batch; r is at most `width`.
        rows: Row indices of each micro-batch in the batch of N rows.
        width: R.

    Example:
        >>> parts = [torch.tensor([[3, 4]]), torch.tensor([[1], [2]])]
        >>> join_microbatches(parts, [[2], [0, 1]], width=2).tolist()
        [[1, 0], [2, 0], [3, 4]]
    """
    padded = [pad(part, (0, width - part.shape[1])) if part.ndim > 1 else part for part in parts]
    order = [row for part in rows for row in part]
    joined = torch.cat(padded)
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    return joined[back.to(joined.device)]

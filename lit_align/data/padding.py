"""Rows of different lengths as one tensor: prompts are left-padded, texts right-padded.

Masks are made from lengths, never from ids, because the pad id may also be a stop id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return token ids [N, P] padded in front, their mask [N, P] and lengths [N] in tokens.

    Args:
        rows: Token ids of each row.
        pad: Token id of the padding.

    Example:
        >>> tokens, mask, lengths = pad_left([[5], [6, 7]], pad=0)
        >>> tokens.tolist(), mask.tolist(), lengths
        ([[0, 5], [6, 7]], [[False, True], [True, True]], [1, 2])
    """
    lengths = [len(row) for row in rows]
    width = max(lengths)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    ends = torch.tensor(lengths).unsqueeze(1)
    return tokens, torch.arange(width) >= width - ends, lengths


def pad_right(
    rows: Sequence[Sequence[int]], pad: int, width: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """Return token ids [N, T] padded at the end, their mask [N, T] and lengths [N] in tokens.

    Args:
        rows: Token ids of each row.
        pad: Token id of the padding.
        width: Least T. T is the longest row's length if that is larger.

    Example:
        >>> tokens, mask, lengths = pad_right([[5], [6, 7]], pad=0, width=3)
        >>> tokens.tolist(), mask.sum(1).tolist()
        ([[5, 0, 0], [6, 7, 0]], [1, 2])
    """
    lengths = [len(row) for row in rows]
    width = max(width, *lengths)
    tokens = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor(lengths).unsqueeze(1), lengths

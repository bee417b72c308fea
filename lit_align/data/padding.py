"""Rows of different lengths as one tensor: prompts end together, whole texts begin together.

Masks are made from lengths, never from ids: the pad id may be a stop's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids [N, P] with the padding in front, their mask [N, P] and lengths [N]."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    ends = torch.tensor(lengths).unsqueeze(1)
    return tokens, torch.arange(width) >= width - ends, lengths


def pad_right(
    rows: Sequence[Sequence[int]], pad: int, width: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids [N, T] with the padding behind, their mask [N, T] and lengths [N].

    T is the longest row's length, or `width` where that is more.
    """
    lengths = [len(row) for row in rows]
    width = max(width, *lengths)
    tokens = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor(lengths).unsqueeze(1), lengths

"""Packing: concatenate the sequences of a batch into one row without padding.

Shapes: N rows of T positions, R response positions, S real tokens in all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.batches import Experience, TextBatch
from lit_align.models.kernels.varlen_attention import SequenceLengths


class PackedBatch(NamedTuple):
    """Sequences of a batch in one row, and the index that restores the padded batch."""

    tokens: Tensor  # [1, S] token ids
    positions: Tensor  # [1, S] position ids, from 0 in each sequence
    sequence_lengths: SequenceLengths  # N lengths
    unpack_index: Tensor  # [N * T] packed index; padding has the index of the nearest token


def is_trimmed(batch: Experience | TextBatch) -> bool:
    """Return True if the lengths alone locate the padding.

    A text batch that is wider than its longest sequence may have padding on the left.

    Args:
        batch: N rows of T positions.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> is_trimmed(TextBatch(tokens=ids, lengths=[3, 2]))
        True
        >>> is_trimmed(TextBatch(tokens=ids, lengths=[2, 2]))
        False
    """
    # At least 2, because `trim_padding` keeps two columns: a single token has no context.
    return isinstance(batch, Experience) or batch.tokens.shape[1] == max(max(batch.lengths), 2)


def pack(batch: Experience | TextBatch) -> PackedBatch:
    """Concatenate the N sequences of a batch into one row.

    Args:
        batch: N rows of T positions, with padding on the left of prompts and on the right.

    Example:
        >>> packed = pack(TextBatch(tokens=torch.tensor([[5, 6, 7], [8, 9, 0]]), lengths=[3, 2]))
        >>> packed.tokens.tolist()
        [[5, 6, 7, 8, 9]]
        >>> packed.unpack_index.tolist()
        [0, 1, 2, 3, 4, 4]
    """
    # Only the lengths are read, which are Python numbers. A mask on a GPU would make the host wait.
    (num_rows, width), lengths, device = batch.tokens.shape, batch.lengths, batch.tokens.device
    num_left_padding = [0] * num_rows
    if isinstance(batch, Experience):
        num_left_padding = [batch.num_context_tokens - length for length in batch.prompt_lengths]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    index = concat_ranges(
        [row * width + num_left_padding[row] for row in range(num_rows)], lengths, device
    )
    # One copy of [3, N] numbers to the device instead of three.
    table = torch.tensor([starts, lengths, num_left_padding]).to(device, non_blocking=True)
    start, length, left_padding = table.unsqueeze(-1).unbind()
    # Clamp to the sequence, so padding gets a finite hidden state.
    steps = (torch.arange(width, device=device) - left_padding).clamp(min=0).minimum(length - 1)
    return PackedBatch(
        batch.tokens.flatten().index_select(0, index).unsqueeze(0),
        concat_ranges([0] * num_rows, lengths, device).unsqueeze(0),
        SequenceLengths(lengths, device),
        (start + steps).flatten(),
    )


def concat_ranges(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the concatenation [S] of the ranges from `start` to `start + length - 1`.

    Args:
        starts: First number of each range.
        lengths: Length of each range; S is their sum.
        device: Device of the result.

    Example:
        >>> concat_ranges([10, 20], [3, 2], torch.device("cpu")).tolist()
        [10, 11, 12, 20, 21]
    """
    total = sum(lengths)
    ends = accumulate(lengths)
    offsets = [start - end + n for start, end, n in zip(starts, ends, lengths, strict=True)]
    table = torch.tensor([offsets, list(lengths)]).to(device, non_blocking=True)
    # With `output_size` a GPU need not report the sum to the host.
    offset = torch.repeat_interleave(table[0], table[1], output_size=total)
    return offset + torch.arange(total, device=device)


def scored_positions(batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
    """Return the positions of hidden states that predict a token, and of the predicted tokens.

    Args:
        batch: N rows of T positions, of which the last R have a context.

    Returns:
        Two indices [S']: of hidden states in [N * T], and of the next tokens in [N * R]. S' counts
        the real tokens that have a context.

    Example:
        >>> batch = TextBatch(tokens=torch.tensor([[5, 6, 7], [8, 9, 0]]), lengths=[3, 2])
        >>> [index.tolist() for index in scored_positions(batch)]
        [[0, 1, 3], [0, 1, 2]]
    """
    (num_rows, length), width = batch.tokens.shape, batch.responses.shape[1]
    if not is_trimmed(batch):
        ends = [width] * num_rows  # all positions, because the padding may be anywhere
    elif isinstance(batch, Experience):
        ends = batch.response_lengths
    else:
        ends = [length - 1 for length in batch.lengths]
    # The hidden state at a position predicts the token after it, hence minus one.
    context_starts = [row * length + batch.num_context_tokens - 1 for row in range(num_rows)]
    device = batch.tokens.device
    token_index = concat_ranges([row * width for row in range(num_rows)], ends, device)
    return concat_ranges(context_starts, ends, device), token_index


def last_token_positions(batch: Experience | TextBatch) -> Tensor:
    """Return the position [N] in [N * T] of the last real token of each row.

    Args:
        batch: N rows of T positions; padding may be on both sides.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> last_token_positions(TextBatch(tokens=ids, token_mask=ids > 0)).tolist()
        [2, 4]
    """
    mask = batch.token_mask
    steps = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return steps.where(mask, 0).amax(-1)

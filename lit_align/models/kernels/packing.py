"""Where tokens lie: as a batch has them, and as a network reads them, without any padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.batches import Experience, TextBatch
from lit_align.models.kernels.varlen_attention import SequenceLengths


class PackedBatch(NamedTuple):
    """All texts of a batch in one row of t tokens, and where the batch's places are in it."""

    tokens: Tensor  # [1, t] token ids
    positions: Tensor  # [1, t] from 0 in each text
    sequence_lengths: SequenceLengths  # where texts end
    unpack_index: Tensor  # [N * T] places in the row; of padding, those of the text's nearest token


def is_trimmed(batch: Experience | TextBatch) -> bool:
    """Whether padding is where it should be: some text of the batch fills its row."""
    return isinstance(batch, Experience) or batch.tokens.shape[1] == max(max(batch.lengths), 2)


def pack(batch: Experience | TextBatch) -> PackedBatch:
    """N texts one behind the other.

    Only their lengths are known on the host, and only [N] numbers go to the device.
    """
    (num_rows, width), lengths, device = batch.tokens.shape, batch.lengths, batch.tokens.device
    num_left_padding = [0] * num_rows  # padding in front
    if isinstance(batch, Experience):
        num_left_padding = [batch.num_context_tokens - length for length in batch.prompt_lengths]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    index = concat_ranges(
        [row * width + num_left_padding[row] for row in range(num_rows)], lengths, device
    )
    table = torch.tensor([starts, lengths, num_left_padding]).to(device, non_blocking=True)
    start, length, front = table.unsqueeze(-1).unbind()
    steps = (torch.arange(width, device=device) - front).clamp(min=0).minimum(length - 1)
    return PackedBatch(
        batch.tokens.flatten().index_select(0, index).unsqueeze(0),
        concat_ranges([0] * num_rows, lengths, device).unsqueeze(0),
        SequenceLengths(lengths, device),
        (start + steps).flatten(),
    )


def concat_ranges(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """[sum of lengths]: the numbers from each start on, as many as its length, start by start."""
    total = sum(lengths)
    ends = accumulate(lengths)
    offsets = [start - end + n for start, end, n in zip(starts, ends, lengths, strict=True)]
    table = torch.tensor([offsets, list(lengths)]).to(device, non_blocking=True)
    offset = torch.repeat_interleave(table[0], table[1], output_size=total)
    return offset + torch.arange(total, device=device)


def scored_positions(batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
    """([n], [n]) of tokens with a context that are no padding: where they are chosen, and stand.

    The first are places in [N * T], of the token before; the second are places in [N * R].
    """
    (num_rows, length), width = batch.tokens.shape, batch.responses.shape[1]
    if not is_trimmed(batch):
        ends = [width] * num_rows
    elif isinstance(batch, Experience):
        ends = batch.response_lengths
    else:
        ends = [length - 1 for length in batch.lengths]
    context_starts = [row * length + batch.num_context_tokens - 1 for row in range(num_rows)]
    device = batch.tokens.device
    token_index = concat_ranges([row * width for row in range(num_rows)], ends, device)
    return concat_ranges(context_starts, ends, device), token_index


def last_token_positions(batch: Experience | TextBatch) -> Tensor:
    """[N] places in [N * T] of each text's last token."""
    mask = batch.token_mask
    steps = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return steps.where(mask, 0).amax(-1)

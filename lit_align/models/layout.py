"""Where tokens lie: as a batch has them, and as a network reads them with nothing in front.

Behind a text, padding needs no mask: a causal network looks backward only. Attention without a mask
takes its fastest kernel, and rows whose prompts differ in length lose the padding between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.batches import Experience, Tokens

MUCH = 0.8  # length of the shorter texts over that of the longer, below which they stand apart


class Reading(NamedTuple):
    """What a network reads, pass by pass, and where the batch's places are in it."""

    passes: list[Tensor]  # [n, t] token ids of each pass, right-padded
    back: Tensor | None  # [N * T] places in all passes, one behind the other; None: as they are


def is_trimmed(batch: Experience | Tokens) -> bool:
    """Whether padding is where it should be: some text of the batch fills its row."""
    return isinstance(batch, Experience) or batch.tokens.shape[1] == max(max(batch.lengths), 2)


def reading(batch: Experience | Tokens, at_once: bool = False) -> Reading:
    """Texts without padding in front; of pairs, the longer texts and the shorter ones apart.

    Args:
        batch: N texts.
        at_once: In one pass, as ranks must that gather weights together.
    """
    num_rows, width = batch.tokens.shape
    spare = [0] * num_rows
    if isinstance(batch, Experience):
        spare = [batch.num_context - length for length in batch.prompt_lengths]
    groups = [list(range(num_rows))] if at_once else together(batch)
    if len(groups) == 1 and not any(spare):
        return Reading([batch.tokens], None)
    starts, ends, passes, before = [0] * num_rows, [0] * num_rows, [], 0
    for rows in groups:
        longest = max(2, *(batch.lengths[row] for row in rows))
        for place, row in enumerate(rows):
            starts[row] = before + place * longest
            ends[row] = starts[row] + longest - 1
        before += len(rows) * longest
        passes.append(moved_forward(batch.tokens, rows, spare, longest))
    places = torch.tensor([starts, ends, spare]).to(batch.tokens.device, non_blocking=True)
    start, end, moves = places.unsqueeze(-1).unbind()
    steps = torch.arange(width, device=batch.tokens.device)
    return Reading(passes, (start + steps - moves).clamp(start, end).flatten())


def together(batch: Experience | Tokens) -> list[list[int]]:
    """Rows of each pass: all, or pairs' longer and shorter texts, if that spares much padding."""
    sides: tuple[list[int], list[int]] = ([], [])
    for row, longer in enumerate(batch.longer if "longer" in batch.fields() else []):
        sides[not longer].append(row)
    long, short = (max((batch.lengths[row] for row in side), default=0) for side in sides)
    return list(sides) if short < MUCH * long else [list(range(len(batch)))]


def moved_forward(tokens: Tensor, rows: list[int], spare: list[int], longest: int) -> Tensor:
    """[n, t] some rows of [N, T] token ids, from each row's first real token on.

    Args:
        tokens: [N, T].
        rows: n of them.
        spare: [N] tokens of padding in front.
        longest: t.
    """
    picked = torch.tensor([rows, [spare[row] for row in rows]])
    which, moves = picked.to(tokens.device, non_blocking=True).unsqueeze(-1).unbind()
    steps = torch.arange(longest, device=tokens.device)
    return tokens[which, (steps + moves).clamp(max=tokens.shape[1] - 1)]


def real_places(batch: Experience | Tokens) -> list[int] | None:
    """Places in [N * R] that are no padding behind a text; None where all of them are real."""
    width = batch.responses.shape[1]
    if isinstance(batch, Experience):
        ends = batch.response_lengths
    else:
        ends = [length - 1 for length in batch.lengths]
    if not is_trimmed(batch) or min(ends) >= width:
        return None
    return [row * width + step for row, end in enumerate(ends) for step in range(end)]

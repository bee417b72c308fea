"""Identical blocks are traced twice, with few of them, and counted up to all."""

from __future__ import annotations

from lit_align.tools.plan import Heights
from lit_align.tools.plan_ledger import Height


def extrapolated(few: Heights, more: Heights, start: int, end: int, number: int) -> Heights:
    """Heights of a network with `number` blocks: each kind grows evenly with them.

    Exact where the peak is at the same moment with any number of blocks; where another moment
    overtakes it beyond `end` blocks, too low.

    Args:
        few: With `start` blocks.
        more: With `end` blocks.
        start: Number of blocks.
        end: Number of blocks, above `start`.
        number: Wanted.
    """
    times = (number - end) / (end - start)
    return {
        phase: {place: grown(few[phase][place], height, times) for place, height in places.items()}
        for phase, places in more.items()
    }


def grown(few: Height, more: Height, times: float) -> Height:
    """`more`, and `times` what it has more than `few`."""
    by_kind = {
        kind: round(size + times * (size - few.by_kind.get(kind, 0)))
        for kind, size in more.by_kind.items()
    }
    return Height(round(more.total + times * (more.total - few.total)), by_kind, more.moment)

"""Identical blocks are traced with few of them, and counted up to all."""

from __future__ import annotations

from typing import NamedTuple

from lit_align.plan.memory_tracker import (
    EstimatedPeak,
    MemoryLocation,
    MemoryTracker,
    PeaksByContext,
)


class Extrapolation(NamedTuple):
    """What a network of all blocks takes.

    Args:
        heights: Of each phase, on the device.
        bent: How far a trace of one more number of blocks is from the line, as a share of the
            largest phase: 0 where all grows evenly.
    """

    heights: dict[str, EstimatedPeak]
    bent: float


def extrapolated(traces: dict[int, MemoryTracker], number: int) -> Extrapolation:
    """The heights of a network with `number` blocks, from the last two of three traces or more.

    Each moment (an operator, forward or backward) grows evenly with the blocks, and the highest one
    at the end counts: which one that is may be another than with few blocks.

    Args:
        traces: By number of blocks, the fewest first.
        number: Wanted.
    """
    first, *_, start, end = traces
    line = highest(traces[start], traces[end], (number - end) / (end - start))
    back = highest(traces[start], traces[end], (first - end) / (end - start))
    real = {
        phase: places[MemoryLocation.DEVICE].total
        for phase, places in traces[first].heights.items()
    }
    apart = max(abs(back[phase].total - size) for phase, size in real.items())
    return Extrapolation(line, apart / max(real.values()))


def highest(few: MemoryTracker, more: MemoryTracker, times: float) -> dict[str, EstimatedPeak]:
    """Of each phase the highest moment, `times` further on than from `few` to `more`."""
    return {
        phase: max(moved(few.moments[phase], moments, times), key=lambda height: height.total)
        for phase, moments in more.moments.items()
    }


def moved(few: PeaksByContext, more: PeaksByContext, times: float) -> list[EstimatedPeak]:
    """Each moment's height; one that only `more` has stays as it is."""
    return [grown(few.get(moment, height), height, times) for moment, height in more.items()]


def grown(few: EstimatedPeak, more: EstimatedPeak, times: float) -> EstimatedPeak:
    """`more`, and `times` what it has more than `few`."""
    by_kind = {
        kind: round(more.by_kind.get(kind, 0) * (1 + times) - times * few.by_kind.get(kind, 0))
        for kind in {**few.by_kind, **more.by_kind}
    }
    return EstimatedPeak(round(more.total + times * (more.total - few.total)), by_kind, more.moment)

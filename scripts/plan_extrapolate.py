"""Extrapolation: peaks of a network with many equal blocks, from traces with a few of them."""

from __future__ import annotations

from typing import NamedTuple

from lit_align.plan.memory_tracker import (
    EstimatedPeak,
    MemoryLocation,
    MemoryTracker,
    PeaksByContext,
)


class Extrapolation(NamedTuple):
    """Peaks of a network with all blocks.

    Args:
        peaks: Peak of each phase on the device.
        deviation: Distance of a further trace from the line through the others, as a fraction of
            the largest phase. 0 means that all memory grows linearly with the number of blocks.
    """

    peaks: dict[str, EstimatedPeak]
    deviation: float


def extrapolate_peaks(traces: dict[int, MemoryTracker], num_blocks: int) -> Extrapolation:
    """Extrapolate the peaks of a network from the last two of at least three traces.

    Args:
        traces: Trackers by number of blocks, the smallest number first.
        num_blocks: Number of blocks to extrapolate to.
    """
    first, *_, start, end = traces
    # Each operator grows linearly, but with more blocks another operator may have the peak. So all
    # operators are extrapolated before the maximum is taken.
    peaks = max_peaks(traces[start], traces[end], (num_blocks - end) / (end - start))
    # The first trace is not on the line by construction, so it checks the assumption.
    check = max_peaks(traces[start], traces[end], (first - end) / (end - start))
    traced = {
        phase: locations[MemoryLocation.DEVICE].total
        for phase, locations in traces[first].peaks.items()
    }
    difference = max(abs(check[phase].total - size) for phase, size in traced.items())
    return Extrapolation(peaks, difference / max(traced.values()))


def max_peaks(few: MemoryTracker, more: MemoryTracker, factor: float) -> dict[str, EstimatedPeak]:
    """Return the largest extrapolated peak of each phase.

    Args:
        few: Tracker with fewer blocks.
        more: Tracker with more blocks.
        factor: Multiple of the difference between the two that is added to `more`.
    """
    return {
        phase: max(
            extrapolate_contexts(few.peaks_by_context[phase], contexts, factor),
            key=lambda peak: peak.total,
        )
        for phase, contexts in more.peaks_by_context.items()
    }


def extrapolate_contexts(
    few: PeaksByContext, more: PeaksByContext, factor: float
) -> list[EstimatedPeak]:
    """Extrapolate the peak at each operator. A peak that only `more` has does not change.

    Args:
        few: Peaks with fewer blocks.
        more: Peaks with more blocks.
        factor: Multiple of the difference between the two that is added to `more`.
    """
    return [
        extrapolate_peak(few.get(context, peak), peak, factor) for context, peak in more.items()
    ]


def extrapolate_peak(few: EstimatedPeak, more: EstimatedPeak, factor: float) -> EstimatedPeak:
    """Return `more` plus `factor` times the difference to `few`, in total and by kind.

    Args:
        few: Peak with fewer blocks.
        more: Peak with more blocks.
        factor: Multiple of the difference.
    """
    by_kind = {
        kind: round(more.by_kind.get(kind, 0) * (1 + factor) - factor * few.by_kind.get(kind, 0))
        for kind in {**few.by_kind, **more.by_kind}
    }
    total = round(more.total + factor * (more.total - few.total))
    return EstimatedPeak(total, by_kind, more.operation)

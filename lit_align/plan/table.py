"""Memory plan as a table, as one line and as JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from lit_align.plan.memory_tracker import EstimatedPeak, MemoryKind, MemoryLocation
from lit_align.plan.simulate import EstimatedPeaks

PHASE_ORDER = ("load", "rollout", "score", "prepare", "update")
GIB = 2**30  # bytes


class MemoryPlan(NamedTuple):
    """Estimated memory of a run.

    Args:
        peaks: Peak of each phase by location.
        memory: Memory of a device in bytes.

    Example:
        >>> from lit_align.plan.memory_tracker import MemoryTracker
        >>> tracker = MemoryTracker()
        >>> tracker.end("load")
        >>> MemoryPlan(tracker.peaks, memory=10).fits
        True
    """

    peaks: EstimatedPeaks
    memory: int

    @property
    def peak(self) -> tuple[str, EstimatedPeak]:
        """Return the phase with the highest peak on the device, and that peak."""
        phase = max(self.peaks, key=lambda name: self.peaks[name][MemoryLocation.DEVICE].total)
        return phase, self.peaks[phase][MemoryLocation.DEVICE]

    @property
    def host(self) -> int:
        """Return the host memory of a rank at its peak, in bytes."""
        return max(peaks[MemoryLocation.HOST].total for peaks in self.peaks.values())

    @property
    def fits(self) -> bool:
        """Return True if the highest peak fits in the memory of a device."""
        return self.peak[1].total <= self.memory


def plan_table(plan: MemoryPlan) -> Table:
    """Return the table of a plan: a row per phase, a column per kind, in GiB.

    Args:
        plan: Estimated memory of a run.
    """
    title = "GiB of a device at the peak of each phase, and of its rank on the host"
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1))
    for name in ("phase", *MemoryKind, "peak", "host"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, locations in sorted(plan.peaks.items(), key=lambda item: PHASE_ORDER.index(item[0])):
        device, host = locations[MemoryLocation.DEVICE], locations[MemoryLocation.HOST]
        kinds = [format_gib(device.by_kind.get(kind, 0)) for kind in MemoryKind]
        table.add_row(phase, *kinds, format_gib(device.total), format_gib(host.total))
    return table


def verdict(plan: MemoryPlan) -> str:
    """Return one line with the peak, its phase and operator, and if it fits.

    Args:
        plan: Estimated memory of a run.
    """
    phase, peak = plan.peak
    outcome = "fits" if plan.fits else "does not fit"
    return (
        f"peak {format_gib(peak.total)} GiB in phase {phase} ({peak.operation}): {outcome} into "
        f"{format_gib(plan.memory)} GiB"
    )


def format_gib(size: int) -> str:
    """Format bytes as GiB with two decimals, or one digit below 0.01 GiB.

    Args:
        size: Bytes.

    Example:
        >>> format_gib(3 * GIB // 2), format_gib(GIB // 250), format_gib(0)
        ('1.50', '0.004', '-')
    """
    value = size / GIB
    return "-" if not size else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Return all bytes of a plan in the form that `lit-align plan --json` prints.

    Args:
        plan: Estimated memory of a run.
    """
    phase, peak = plan.peak
    return {
        "fits": plan.fits,
        "memory": plan.memory,
        "peak": peak.total,
        "phase": phase,
        "moment": peak.operation,
        "host": plan.host,
        "phases": {
            name: {
                str(location): {
                    "peak": peaks[location].total,
                    "by": {str(k): size for k, size in peaks[location].by_kind.items()},
                    "moment": peaks[location].operation,
                }
                for location in MemoryLocation
            }
            for name, peaks in plan.peaks.items()
        },
    }

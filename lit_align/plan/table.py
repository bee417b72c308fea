"""A plan as people and as machines read it."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from lit_align.plan.memory_tracker import Height, Kind, Place
from lit_align.plan.simulate import Heights

ORDER = ("load", "rollout", "score", "prepare", "update")
GIB = 2**30  # bytes


class Plan(NamedTuple):
    """What a run takes.

    Args:
        heights: The most of each phase.
        memory: Bytes of a device.
    """

    heights: Heights
    memory: int

    @property
    def peak(self) -> tuple[str, Height]:
        """The phase with the most bytes on the device, and what is there then."""
        phase = max(self.heights, key=lambda name: self.heights[name][Place.DEVICE].total)
        return phase, self.heights[phase][Place.DEVICE]

    @property
    def host(self) -> int:
        """The most bytes of a rank on the host."""
        return max(heights[Place.HOST].total for heights in self.heights.values())

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.peak[1].total <= self.memory


def table(plan: Plan) -> Table:
    """Phase by kind, in GiB of one device, and what is on the host."""
    title = "GiB of a device at the height of each phase, and of its rank on the host"
    shown = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1))
    for name in ("phase", *Kind, "peak", "host"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for phase, places in sorted(plan.heights.items(), key=lambda item: ORDER.index(item[0])):
        device, host = places[Place.DEVICE], places[Place.HOST]
        kinds = [gib(device.by_kind.get(kind, 0)) for kind in Kind]
        shown.add_row(phase, *kinds, gib(device.total), gib(host.total))
    return shown


def verdict(plan: Plan) -> str:
    """The peak, where it is, and whether it fits."""
    phase, height = plan.peak
    word = "fits" if plan.fits else "does not fit"
    return (
        f"peak {gib(height.total)} GiB in phase {phase} ({height.moment}): {word} into "
        f"{gib(plan.memory)} GiB"
    )


def gib(size: int) -> str:
    """Bytes as GiB, with three digits where it is little."""
    value = size / GIB
    return "-" if not size else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def as_json(plan: Plan) -> dict[str, Any]:
    """All bytes, for machines."""
    phase, height = plan.peak
    return {
        "fits": plan.fits,
        "memory": plan.memory,
        "peak": height.total,
        "phase": phase,
        "moment": height.moment,
        "host": plan.host,
        "phases": {
            name: {
                str(place): {
                    "peak": heights[place].total,
                    "by": {str(k): size for k, size in heights[place].by_kind.items()},
                    "moment": heights[place].moment,
                }
                for place in Place
            }
            for name, heights in plan.heights.items()
        },
    }

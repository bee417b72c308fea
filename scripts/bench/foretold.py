"""The plans of the runs of `accuracy.py`."""

from __future__ import annotations

from functools import partial

from bench.accuracy import run, size_of
from lit_align.plan.memory_tracker import MemoryLocation
from lit_align.plan.simulate import Machine, SimulatedRun, simulate_peaks


def planned(name: str, model: str, folder: str, device: str) -> dict[str, int]:
    """Bytes at the height of each phase, as the plan has them.

    Args:
        name: Of the method.
        model: Of all networks.
        folder: For what a run would write.
        device: cpu, or cuda: where it is to be.
    """
    build = partial(run, name, size_of(model), folder, "cpu")
    peaks = simulate_peaks(lambda: SimulatedRun(*build()), Machine(is_gpu=device != "cpu"))
    return {phase: locations[MemoryLocation.DEVICE].total for phase, locations in peaks.items()}

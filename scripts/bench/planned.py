"""Memory estimates of the fits in `accuracy.py`."""

from __future__ import annotations

from functools import partial

from bench.accuracy import run, size_of
from lit_align.plan.memory_tracker import MemoryLocation
from lit_align.plan.simulate import Machine, SimulatedRun, simulate_peaks


def planned(name: str, model: str, folder: str, device: str) -> dict[str, int]:
    """Return the estimated peak bytes of each phase.

    Args:
        name: Name of the method.
        model: Name of the model, as in `size_of`.
        folder: Folder that a run would write to.
        device: Device of the run: cpu or cuda.
    """
    build = partial(run, name, size_of(model), folder, "cpu")
    peaks = simulate_peaks(lambda: SimulatedRun(*build()), Machine(is_gpu=device != "cpu"))
    return {phase: locations[MemoryLocation.DEVICE].total for phase, locations in peaks.items()}

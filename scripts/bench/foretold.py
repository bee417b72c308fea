"""The plans of the runs of `accuracy.py`."""

from __future__ import annotations

from functools import partial

from bench.accuracy import run, size_of
from lit_align.plan.memory_tracker import Place
from lit_align.plan.simulate import Machine, Run, simulated


def planned(name: str, model: str, folder: str, device: str) -> dict[str, int]:
    """Bytes at the height of each phase, as the plan has them.

    Args:
        name: Of the method.
        model: Of all networks.
        folder: For what a run would write.
        device: cpu, or cuda: where it is to be.
    """
    build = partial(run, name, size_of(model), folder, "cpu")
    heights = simulated(lambda: Run(*build()), Machine(is_card=device != "cpu"))
    return {phase: places[Place.DEVICE].total for phase, places in heights.items()}

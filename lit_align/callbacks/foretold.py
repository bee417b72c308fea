"""How far a plan's peaks were from those of the run that followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.memory import Memory

GIB = 2**30  # bytes


class Foretold(Callback):
    """Says after a fit what was planned and what `Memory` has measured, on the first rank.

    A plan takes every text to be as long as it may be, so a run of shorter ones stays below it.

    Args:
        planned: Bytes at the height of each phase.
        memory: What measures; its `memory.csv` gets the plan as a column.
    """

    def __init__(self, planned: Mapping[str, int], memory: Memory):
        self.planned, self.memory = planned, memory
        memory.planned = planned

    def on_fit_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Prints a line per phase."""
        if trainer.is_global_zero:
            print(*self.lines(), sep="\n", flush=True)

    def lines(self) -> Iterator[str]:
        """Planned and measured GiB of each phase."""
        yield "memory, GiB     planned   measured   difference"
        for phase, peak in self.memory.peaks.items():
            foretold, found = self.planned.get(phase, 0), peak.peak
            share = f"{foretold / found - 1:>+12.1%}" if found else " " * 11 + "-"
            yield f"  {phase:<10} {foretold / GIB:>10.3f} {found / GIB:>10.3f} {share}"

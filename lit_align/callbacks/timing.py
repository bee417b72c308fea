"""Seconds of each phase and tokens per second."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.core.base import Algorithm


class Timing(Callback):
    """Measure rollout, score, prepare and update of each iteration.

    Logs `time/<phase>` (seconds, slowest rank) and `tokens_per_second` (real tokens of all ranks
    per second of all phases). A phase ends when its kernels are finished, so a GPU is synchronized
    once per phase.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: dict[str, float] = {}  # by phase, since the last log

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Start to measure. Loading before the first iteration is not included."""
        self.device, self.seconds = trainer.strategy.root_device, {}
        algorithm.phase_listeners.append(self)

    def begin(self, phase: str) -> None:
        """Start the clock of a phase.

        Args:
            phase: Name of the phase.
        """
        self.started = time.monotonic()

    def end(self, phase: str) -> None:
        """Add the seconds of a phase. An iteration may run a phase several times.

        Args:
            phase: Name of the phase.
        """
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        passed = time.monotonic() - self.started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the seconds and the speed of the iteration."""
        for phase, seconds in self.seconds.items():
            algorithm.log(f"time/{phase}", seconds, sync_dist=True, reduce_fx="max")
        total = sum(self.seconds.values())
        if total > 0:
            speed = sum(batch.lengths) / total
            algorithm.log("tokens_per_second", speed, sync_dist=True, reduce_fx="sum")
        self.seconds = {}

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Stop measuring."""
        if self in algorithm.phase_listeners:
            algorithm.phase_listeners.remove(self)

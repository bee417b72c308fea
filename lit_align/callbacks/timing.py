"""Where the time goes: seconds of each phase, and tokens per second."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.core.base import Algorithm


class Timing(Callback):
    """Measures rollout, score, prepare and update of each iteration.

    Logged are `time/<phase>`, seconds of the slowest rank, and `tokens_per_second`: real tokens of
    prompts and answers that all ranks went through, over the seconds of all phases. A phase ends
    when its kernels are done, for which a GPU is waited for at most once per phase.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: dict[str, float] = {}  # since the last log, by phase

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Begins to watch; what was loaded before is no part of an iteration."""
        self.device, self.seconds = trainer.strategy.root_device, {}
        algorithm.phase_listeners.append(self)

    def begin(self, phase: str) -> None:
        """A phase starts."""
        self.started = time.monotonic()

    def end(self, phase: str) -> None:
        """Adds its seconds; there may be several of one name in an iteration."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        passed = time.monotonic() - self.started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the iteration's seconds and its speed."""
        for phase, seconds in self.seconds.items():
            algorithm.log(f"time/{phase}", seconds, sync_dist=True, reduce_fx="max")
        total = sum(self.seconds.values())
        if total > 0:
            speed = sum(batch.lengths) / total
            algorithm.log("tokens_per_second", speed, sync_dist=True, reduce_fx="sum")
        self.seconds = {}

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Stops watching."""
        if self in algorithm.phase_listeners:
            algorithm.phase_listeners.remove(self)

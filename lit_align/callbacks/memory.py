"""Measured peak of memory by phase, split into weights, gradients, states and the rest."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor
from torch.optim import Optimizer

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.reward import Reward
from lit_align.errors import UserError
from lit_align.models.parallel.offload import optimizer_state_tensors
from lit_align.runs.allocations import (
    AcceleratorAllocations,
    Allocations,
    CPUAllocations,
    storage_bytes,
)

MIB = 2**20  # bytes


class PhasePeak(NamedTuple):
    """Measured peak of a phase, in bytes on this rank's device.

    Args:
        peak: Most bytes in use at once.
        parameters: Weights of all networks, also frozen ones, at the end of the phase.
        gradients: Gradients at the last optimizer step of the phase.
        optimizer_state: Optimizer states at the end of the phase.
        other: The rest of the peak: activations, temporaries, KV cache, batch.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer_state: int
    other: int


class Memory(Callback):
    """Measure the memory of each phase: load, rollout, score, prepare, update.

    The bytes are those of the allocator, not of the process. `memory/<phase>` and `memory/peak` are
    logged in MiB, the largest of all ranks. `memory.csv` in the run folder has the largest peak of
    each phase in bytes, by category. A GPU counts without cost. On a CPU, torch's profiler records
    the whole fit except evaluations. It costs 30 % more time for 0.26 M parameters, less for
    larger models. Put it before `Reward` to also count a reward model that is loaded.
    """

    allocations: Allocations

    def __init__(self) -> None:
        self.peaks: dict[str, PhasePeak] = {}  # the largest of the run, by phase
        self.latest_peaks: dict[str, int] = {}  # bytes since the last log, by phase
        self.gradients = 0  # bytes when the optimizer stepped

    # When -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Start to count, before any network is built."""
        if stage != "fit":
            return
        self.peaks, self.latest_peaks = {}, {}
        self.trainer, self.algorithm = trainer, algorithm
        self.device = trainer.strategy.root_device
        on_cpu = self.device.type == "cpu"
        if on_cpu and isinstance(trainer.profiler, PyTorchProfiler):
            raise UserError(
                "Memory uses torch's profiler on a CPU, and only one profiler can run. Remove "
                "--trainer.profiler pytorch or the callback Memory."
            )
        self.allocations = CPUAllocations() if on_cpu else AcceleratorAllocations(self.device)
        self.allocations.start()
        algorithm.phase_listeners.append(self)

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Count networks that were built before `setup`, and watch the optimizer steps."""
        self.allocations.raise_floor(
            storage_bytes(all_weights(self.trainer, self.algorithm), self.device)
        )
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self.record_gradients)

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Stop counting while an algorithm precomputes."""
        self.allocations.stop()

    def on_train_epoch_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Start to count, so that the first batch is included."""
        self.allocations.start()

    def on_validation_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Stop counting in an evaluation, which is not a phase."""
        if self in algorithm.phase_listeners:
            self.allocations.stop()

    def on_validation_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Start to count again."""
        if self in algorithm.phase_listeners:
            self.allocations.start()

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Stop counting."""
        if self in algorithm.phase_listeners:
            algorithm.phase_listeners.remove(self)
            self.allocations.stop()

    def on_exception(
        self, trainer: Trainer, algorithm: Algorithm, exception: BaseException
    ) -> None:
        """Stop counting. The profiler would otherwise stay on after an error."""
        self.teardown(trainer, algorithm, "fit")

    # What -----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Reset the peak at the start of a phase.

        Args:
            phase: Name of the phase.
        """
        self.gradients = 0
        self.allocations.begin()

    def record_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the bytes of all gradients. Called before each optimizer step."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self.gradients = storage_bytes(gradients, self.device)

    def end(self, phase: str) -> None:
        """Keep the peak of the phase if it is the largest of the run.

        Args:
            phase: Name of the phase.
        """
        measured = self.allocations.end()
        parameters = storage_bytes(all_weights(self.trainer, self.algorithm), self.device)
        state = [
            tensor
            for optimizer in self.trainer.optimizers
            for tensor in optimizer_state_tensors(optimizer)
        ]
        static = (parameters, self.gradients, storage_bytes(state, self.device))
        # Add weights loaded before `setup`, which the allocator's count may lack.
        peak = max(measured, sum(static))
        self.latest_peaks[phase] = max(peak, self.latest_peaks.get(phase, 0))
        if phase not in self.peaks or peak > self.peaks[phase].peak:
            self.peaks[phase] = PhasePeak(peak, *static, peak - sum(static))

    # Where to -------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the peaks of the iteration, and write those of the run."""
        phase_peaks = {**self.latest_peaks, "peak": max(self.latest_peaks.values())}
        for phase, size in phase_peaks.items():
            value = torch.tensor(size / MIB, device=self.device)
            bar = phase == "peak"
            algorithm.log(f"memory/{phase}", value, bar, sync_dist=True, reduce_fx="max")
        self.latest_peaks = {}
        self.write_csv(trainer)

    def write_csv(self, trainer: Trainer) -> None:
        """Write one row per phase, in bytes, to the file of this rank."""
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"memory{rank}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", *PhasePeak._fields])
            writer.writerows([phase, *peak] for phase, peak in self.peaks.items())


def all_weights(trainer: Trainer, algorithm: Algorithm) -> Iterator[Tensor]:
    """Yield the weights of all roles and of the reward models."""
    yield from algorithm.parameters()
    for callback in trainer.callbacks:
        if isinstance(callback, Reward):
            for source in callback.weighted_sum.functions.values():
                for role in source.all_roles():
                    yield from role.network.parameters()

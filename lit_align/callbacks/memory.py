"""Where the memory goes: the most bytes in each phase, and what they are for."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
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
    """The largest memory of a phase, in bytes on this rank's device.

    Args:
        peak: Most bytes in use at once.
        parameters: Weights of all networks, frozen ones too, when the phase ends.
        gradients: Of the weights that train, when the optimizer steps.
        optimizer_state: When the phase ends.
        other: What the peak has beyond these: activations, temporaries, caches, the batch.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer_state: int
    other: int


class Memory(Callback):
    """Measures each phase: load, rollout, score, prepare, update.

    The bytes are the allocator's, not the process's. They are in the log (`memory/<phase>` and
    their largest, `memory/peak`, in MiB, the most of all ranks), in the progress line and in
    Lightning's bar where that is on, and in the run folder's `memory.csv`: the largest peak of each
    phase by category, in bytes. On a GPU this costs nothing. On a CPU torch's profiler listens from
    the start of a fit to its end, except during evaluation: 30 % more time with a model of 0.26 M
    parameters, less with larger ones. A reward model is seen as it is loaded if this stands before
    `Reward`.
    """

    allocations: Allocations

    def __init__(self) -> None:
        self.peaks: dict[str, PhasePeak] = {}  # the largest of the run, by phase
        self.latest_peaks: dict[str, int] = {}  # bytes since the last log, by phase
        self.gradients = 0  # bytes when the optimizer stepped
        self.planned: Mapping[str, int] = {}  # bytes by phase, where somebody has foretold them

    # When -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Begins to listen, before a network is there."""
        if stage != "fit":
            return
        self.peaks, self.latest_peaks = {}, {}
        self.trainer, self.algorithm = trainer, algorithm
        self.device = trainer.strategy.root_device
        on_cpu = self.device.type == "cpu"
        if on_cpu and isinstance(trainer.profiler, PyTorchProfiler):
            raise UserError(
                "Memory listens through torch's profiler, of which there is one: leave out "
                "--trainer.profiler pytorch, or Memory."
            )
        self.allocations = CPUAllocations() if on_cpu else AcceleratorAllocations(self.device)
        self.allocations.start()
        algorithm.phase_listeners.append(self)

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """All networks are there; some may have been built before anyone listened."""
        self.allocations.raise_floor(
            storage_bytes(all_weights(self.trainer, self.algorithm), self.device)
        )
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self.record_gradients)

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """What an algorithm computes in advance belongs to no phase."""
        self.allocations.stop()

    def on_train_epoch_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Listens while the data are loaded, too."""
        self.allocations.start()

    def on_validation_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Evaluation is no phase of training."""
        if self in algorithm.phase_listeners:
            self.allocations.stop()

    def on_validation_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Goes on."""
        if self in algorithm.phase_listeners:
            self.allocations.start()

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Stops listening."""
        if self in algorithm.phase_listeners:
            algorithm.phase_listeners.remove(self)
            self.allocations.stop()

    def on_exception(
        self, trainer: Trainer, algorithm: Algorithm, exception: BaseException
    ) -> None:
        """Stops listening; the profiler would stay on."""
        self.teardown(trainer, algorithm, "fit")

    # What -----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """A phase starts."""
        self.gradients = 0
        self.allocations.begin()

    def record_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """All gradients are there: the optimizer is about to step."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self.gradients = storage_bytes(gradients, self.device)

    def end(self, phase: str) -> None:
        """Keeps the phase's peak, if it is the largest."""
        measured = self.allocations.end()
        parameters = storage_bytes(all_weights(self.trainer, self.algorithm), self.device)
        state = [
            tensor
            for optimizer in self.trainer.optimizers
            for tensor in optimizer_state_tensors(optimizer)
        ]
        static = (parameters, self.gradients, storage_bytes(state, self.device))
        peak = max(measured, sum(static))  # of weights that were there before, nobody heard
        self.latest_peaks[phase] = max(peak, self.latest_peaks.get(phase, 0))
        if phase not in self.peaks or peak > self.peaks[phase].peak:
            self.peaks[phase] = PhasePeak(peak, *static, peak - sum(static))

    # Where to -------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the iteration's peaks, and writes those of the run."""
        phase_peaks = {**self.latest_peaks, "peak": max(self.latest_peaks.values())}
        for phase, size in phase_peaks.items():
            value = torch.tensor(size / MIB, device=self.device)
            bar = phase == "peak"
            algorithm.log(f"memory/{phase}", value, bar, sync_dist=True, reduce_fx="max")
        self.latest_peaks = {}
        self.write_csv(trainer)

    def write_csv(self, trainer: Trainer) -> None:
        """One row per phase, in bytes; each rank has a file."""
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"memory{rank}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            extra = ["planned"] if self.planned else []
            writer.writerow(["phase", *PhasePeak._fields, *extra])
            for phase, peak in self.peaks.items():
                writer.writerow([phase, *peak, *[self.planned.get(phase, 0) for _ in extra]])


def all_weights(trainer: Trainer, algorithm: Algorithm) -> Iterator[Tensor]:
    """Those of all roles, and of the reward models."""
    yield from algorithm.parameters()
    for callback in trainer.callbacks:
        if isinstance(callback, Reward):
            for source in callback.weighted_sum.functions.values():
                for role in source.all_roles():
                    yield from role.network.parameters()

"""Simulation of a run: the real code on fake tensors, with its peak memory by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.plan.dispatch_mode import AllocationMode, attribute_to
from lit_align.plan.fake_cluster import fake_process_group
from lit_align.plan.gpu_kernels import (
    CPU_SCRATCH,
    CUBLAS_WORKSPACE,
    GPU_SCRATCH,
    round_to_cuda_block,
)
from lit_align.plan.max_length_data import MaxLengthData
from lit_align.plan.memory_tracker import EstimatedPeak, MemoryKind, MemoryLocation, MemoryTracker
from lit_align.plan.patches import fake_tensor_patches, gpu_patches
from lit_align.plan.phase_tracker import PhaseTracker
from lit_align.plan.stubs import (
    FakeReward,
    SkipRepeatedMicrobatches,
    disable_metrics,
    fill_max_length_responses,
    stub_precomputed,
)
from lit_align.plan.tracking_patches import track_patched_calls


class Machine(NamedTuple):
    """Machine of a simulated run.

    Args:
        ranks: Number of devices of all nodes.
        memory: Memory of a device in bytes. Default: 80 GB.
        is_gpu: True if the device is a GPU, False if it is the CPU.
        has_process_group: True if the strategy is distributed, also with one rank.
    """

    ranks: int = 1
    memory: int = 80 * 10**9
    is_gpu: bool = True
    has_process_group: bool = False


class SimulatedRun(NamedTuple):
    """Objects of a run that is simulated.

    Args:
        trainer: Trainer for one pass over `data`.
        algorithm: Algorithm that has not been fitted.
        data: Batches of the maximum length.
    """

    trainer: Trainer
    algorithm: Algorithm
    data: MaxLengthData


EstimatedPeaks = dict[str, dict[MemoryLocation, EstimatedPeak]]


def simulate_peaks(build: Callable[[], SimulatedRun], machine: Machine) -> EstimatedPeaks:
    """Return the peak memory of each phase on the first rank, by location and kind.

    Args:
        build: Function that builds the run, as in `simulate`.
        machine: Machine of the run.
    """
    return simulate(build, machine).peaks


def simulate(build: Callable[[], SimulatedRun], machine: Machine) -> MemoryTracker:
    """Simulate a run and return the tracker of its memory.

    Args:
        build: Function that builds the run. It is called in a mode in which tensors have no values.
        machine: Machine of the run.
    """
    tracker = MemoryTracker(round_to_cuda_block if machine.is_gpu else int)
    with simulation(tracker, machine):
        run = build()
        install_stubs(run, tracker)
        run.trainer.fit(run.algorithm, run.data)
    return tracker


@contextmanager
def simulation(tracker: MemoryTracker, machine: Machine) -> Iterator[None]:
    """Create fake tensors inside the block and track their memory.

    Args:
        tracker: Tracker of storages.
        machine: Machine of the run.
    """
    # Networks are built on the host first. Without a GPU the host is the device.
    location = MemoryLocation.HOST if machine.is_gpu else MemoryLocation.DEVICE
    with ExitStack() as stack:
        # Compiled graphs would hide their operators from the dispatch mode.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if machine.has_process_group:
            stack.enter_context(fake_process_group(machine.ranks))
        stack.enter_context(track_patched_calls(tracker))
        stack.enter_context(fake_tensor_patches(tracker, machine.memory))
        if machine.is_gpu:
            stack.enter_context(gpu_patches(tracker))
        stack.enter_context(attribute_to(tracker, MemoryKind.PARAMETERS, location))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        scratch_sizes, workspace = (
            (GPU_SCRATCH, CUBLAS_WORKSPACE) if machine.is_gpu else (CPU_SCRATCH, 0)
        )
        # Last, so that it is above the fake tensors and sees each operator first.
        stack.enter_context(AllocationMode(tracker, scratch_sizes, workspace))
        yield


def install_stubs(run: SimulatedRun, tracker: MemoryTracker) -> None:
    """Install the stubs and the phase tracker in a run.

    Args:
        run: Run, changed in place.
        tracker: Tracker of storages.
    """
    trainer, algorithm = run.trainer, run.algorithm
    disable_metrics(algorithm)
    stub_precomputed(algorithm)
    SkipRepeatedMicrobatches(algorithm)
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    for callback in callbacks:
        if isinstance(callback, Rollout):
            vars(callback)["add_masks_and_texts"] = partial(fill_max_length_responses, callback)
        if isinstance(callback, Reward):
            vars(callback)["score_batch"] = FakeReward(callback, tracker)
    phase_tracker = PhaseTracker(tracker, trainer, algorithm)
    # First, so that its hooks run before those of other callbacks.
    callbacks.insert(0, phase_tracker)
    algorithm.phase_listeners.append(phase_tracker)
    # Through `vars`, because these are methods of the class. Checked with lightning 2.6.6.
    vars(trainer.strategy).update(
        model_to_device=partial(phase_tracker.move_to_device, algorithm),
        tensor_init_context=partial(
            phase_tracker.init_context, trainer.strategy.tensor_init_context
        ),
        setup_environment=run_outside_fake_mode(trainer.strategy.setup_environment),
        teardown=lambda: None,
    )


def run_outside_fake_mode(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that runs with real tensors: a device mesh needs the values of its ranks.

    Args:
        function: Function without arguments.
    """

    def run_with_values() -> None:
        with _disable_current_modes():  # private, torch 2.13
            function()

    return run_with_values

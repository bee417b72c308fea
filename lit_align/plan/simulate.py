"""Peak memory of a run before it is run: the real code on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.memory import all_weights
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.offload import optimizer_state_tensors
from lit_align.plan.dispatch_mode import AllocationMode, attribute_to
from lit_align.plan.gpu_kernels import (
    CPU_SCRATCH,
    CUBLAS_WORKSPACE,
    GPU_SCRATCH,
    round_to_cuda_block,
)
from lit_align.plan.max_length_data import MaxLengthData
from lit_align.plan.memory_tracker import EstimatedPeak, MemoryKind, MemoryLocation, MemoryTracker
from lit_align.plan.patches import (
    fake_process_group,
    fake_tensor_patches,
    gpu_patches,
    track_patched_calls,
)
from lit_align.plan.stubs import (
    FakeReward,
    SkipRepeatedMicrobatches,
    disable_logging,
    fill_max_length_responses,
    stub_precomputed,
)


class Machine(NamedTuple):
    """Where a run is to be.

    Args:
        ranks: Number of devices of all nodes.
        memory: Bytes of a device.
        is_gpu: Whether the device is a GPU, or the host itself.
        has_process_group: Whether ranks talk, even if there is one alone.
    """

    ranks: int = 1
    memory: int = 80 * 10**9
    is_gpu: bool = True
    has_process_group: bool = False


class SimulatedRun(NamedTuple):
    """What is planned.

    Args:
        trainer: For one pass over `data`.
        algorithm: Not yet fitted.
        data: Batches of the longest texts.
    """

    trainer: Trainer
    algorithm: Algorithm
    data: MaxLengthData


EstimatedPeaks = dict[str, dict[MemoryLocation, EstimatedPeak]]


def simulate_peaks(build: Callable[[], SimulatedRun], machine: Machine) -> EstimatedPeaks:
    """The most bytes of each phase, of the first rank, by location and kind.

    Args:
        build: As in `simulate`.
        machine: Where it is to be.
    """
    return simulate(build, machine).peaks


def simulate(build: Callable[[], SimulatedRun], machine: Machine) -> MemoryTracker:
    """All that is written down of a run.

    Args:
        build: Makes the run; called where tensors have no values.
        machine: Where it is to be.
    """
    tracker = MemoryTracker(round_to_cuda_block if machine.is_gpu else int)
    with simulation(tracker, machine):
        run = build()
        install_stubs(run, tracker)
        run.trainer.fit(run.algorithm, run.data)
    return tracker


@contextmanager
def simulation(tracker: MemoryTracker, machine: Machine) -> Iterator[None]:
    """All that makes tensors weightless and watched."""
    location = MemoryLocation.HOST if machine.is_gpu else MemoryLocation.DEVICE
    with ExitStack() as stack:
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
        stack.enter_context(AllocationMode(tracker, scratch_sizes, workspace))
        yield


def install_stubs(run: SimulatedRun, tracker: MemoryTracker) -> None:
    """Puts the stand-ins into a run."""
    trainer, algorithm = run.trainer, run.algorithm
    disable_logging(algorithm)
    stub_precomputed(algorithm)
    SkipRepeatedMicrobatches(algorithm)
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    for callback in callbacks:
        if isinstance(callback, Rollout):
            vars(callback)["add_masks_and_texts"] = partial(fill_max_length_responses, callback)
        if isinstance(callback, Reward):
            vars(callback)["score_batch"] = FakeReward(callback, tracker)
    phase_tracker = PhaseTracker(tracker, run)
    callbacks.insert(0, phase_tracker)
    algorithm.phase_listeners.append(phase_tracker)
    vars(trainer.strategy).update(
        model_to_device=partial(phase_tracker.move_to_device, algorithm),
        tensor_init_context=partial(
            phase_tracker.init_context, trainer.strategy.tensor_init_context
        ),
        setup_environment=run_outside_fake_mode(trainer.strategy.setup_environment),
        teardown=lambda: None,
    )


def run_outside_fake_mode(function: Callable[[], None]) -> Callable[[], None]:
    """Calls a function where tensors have values: a mesh of ranks is made of some."""

    def called() -> None:
        with _disable_current_modes():
            function()

    return called


class PhaseTracker(Callback):
    """Says of weights, gradients and state that they are these; begins and ends phases.

    Args:
        tracker: To whom.
        run: Whose.
    """

    def __init__(self, tracker: MemoryTracker, run: SimulatedRun):
        self.tracker = tracker
        self.trainer, self.algorithm = run.trainer, run.algorithm
        strategy = run.trainer.strategy
        self.offloads_to_cpu = isinstance(strategy, FSDP2) and strategy.cpu_offload
        self.optimizers: list[Optimizer] = []

    @contextmanager
    def init_context(self, context: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        """Networks come into being on the device, unless they are split first.

        Args:
            context: The strategy's own.
        """
        location = (
            None
            if isinstance(self.trainer.strategy, ModelParallelStrategy)
            else MemoryLocation.DEVICE
        )
        with attribute_to(self.tracker, location=location), context():
            yield

    def move_to_device(self, algorithm: LightningModule) -> None:
        """Networks come to the device, shards that sleep on the host apart."""
        for tensor in [*algorithm.parameters(), *algorithm.buffers()]:
            if not (self.offloads_to_cpu and isinstance(tensor, DTensor)):
                self.tracker.label(tensor, MemoryKind.PARAMETERS, MemoryLocation.DEVICE)
        self.tracker.target = (MemoryLocation.DEVICE, None)
        self.tracker.update_peaks("to the device")
        self.tracker.end("load")

    def on_fit_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Watches gradients and steps."""
        for weight in algorithm.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.register_post_accumulate_grad_hook(self.record_gradient)
        self.optimizers = list(trainer.optimizers)
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self.before_step)
            optimizer.register_step_post_hook(self.after_step)

    def on_train_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """A step in advance, on gradients without a pass: state is there from the beginning."""
        self.begin("update")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.zeros_like(weight)
                    location = MemoryLocation.HOST if self.offloads_to_cpu else None
                    self.tracker.label(weight.grad, MemoryKind.GRADIENTS, location)
            optimizer.step()
            optimizer.zero_grad()
        self.end("update")
        self.has_state = all(optimizer.state for optimizer in self.optimizers)

    def on_train_batch_end(self, trainer: Trainer, *hook: Any) -> None:
        """One batch is enough, unless state comes in backward."""
        trainer.should_stop = self.has_state

    def record_gradient(self, weight: Tensor) -> None:
        """A gradient is complete."""
        if weight.grad is not None:
            self.tracker.label(weight.grad, MemoryKind.GRADIENTS)

    def before_step(self, optimizer: Optimizer, *call: Any) -> None:
        """The optimizer steps where its weights are."""
        self.previous_target = self.tracker.target
        if self.offloads_to_cpu:
            self.tracker.target = (MemoryLocation.HOST, None)

    def after_step(self, optimizer: Optimizer, *call: Any) -> None:
        """State is there."""
        self.tracker.target = self.previous_target
        for state in optimizer_state_tensors(optimizer):
            self.tracker.label(state, MemoryKind.STATE)

    def begin(self, phase: str) -> None:
        """A phase begins, of the algorithm's."""
        for weight in all_weights(self.trainer, self.algorithm) if phase != "load" else ():
            self.tracker.label(weight, MemoryKind.PARAMETERS)
        self.tracker.begin(phase)

    def end(self, phase: str) -> None:
        """A phase is over."""
        self.tracker.end(phase)

"""Phase tracker: labels tensors in the memory tracker and marks the phases of a simulated run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.memory import all_weights
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.offload import optimizer_state_tensors
from lit_align.plan.dispatch_mode import attribute_to
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker


class PhaseTracker(Callback):
    """Label parameters, gradients and optimizer state in a tracker, and mark the phases.

    Args:
        tracker: Tracker of storages.
        trainer: Trainer of the run.
        algorithm: Algorithm of the run.
    """

    def __init__(self, tracker: MemoryTracker, trainer: Trainer, algorithm: Algorithm):
        self.tracker, self.trainer, self.algorithm = tracker, trainer, algorithm
        strategy = trainer.strategy
        self.offloads_to_cpu = isinstance(strategy, FSDP2) and strategy.cpu_offload
        self.optimizers: list[Optimizer] = []

    @contextmanager
    def init_context(self, context: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        """Build networks on the device, unless they are sharded first.

        Args:
            context: Context of the strategy.
        """
        location = (
            None
            if isinstance(self.trainer.strategy, ModelParallelStrategy)
            else MemoryLocation.DEVICE
        )
        with attribute_to(self.tracker, location=location), context():
            yield

    def move_to_device(self, algorithm: LightningModule) -> None:
        """Count all networks on the device, except shards that are offloaded.

        Args:
            algorithm: Algorithm with its networks.
        """
        for tensor in [*algorithm.parameters(), *algorithm.buffers()]:
            if not (self.offloads_to_cpu and isinstance(tensor, DTensor)):
                self.tracker.label(tensor, MemoryKind.PARAMETERS, MemoryLocation.DEVICE)
        self.tracker.target = (MemoryLocation.DEVICE, None)
        self.tracker.update_peaks("to the device")
        self.tracker.end("load")

    def on_fit_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Register hooks for gradients and optimizer steps.

        Args:
            trainer: Trainer of the run.
            algorithm: Algorithm with its networks.
        """
        # Gradients of shards are labeled by the patched FSDP2.
        for weight in algorithm.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.register_post_accumulate_grad_hook(self.record_gradient)
        self.optimizers = list(trainer.optimizers)
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self.before_step)
            optimizer.register_step_post_hook(self.after_step)

    def on_train_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Run one optimizer step before training.

        So the optimizer state is in memory in the first batch.

        Args:
            trainer: Trainer of the run.
            algorithm: Algorithm with its networks.
        """
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
        """Stop after one batch if the optimizer state existed before.

        Args:
            trainer: Trainer of the run.
            *hook: Other arguments of the hook.
        """
        # GaLore's update in backward creates its state only there, and needs a second batch.
        trainer.should_stop = self.has_state

    def record_gradient(self, weight: Tensor) -> None:
        """Label the gradient of a weight when it is complete.

        Args:
            weight: Weight with a gradient.
        """
        if weight.grad is not None:
            self.tracker.label(weight.grad, MemoryKind.GRADIENTS)

    def before_step(self, optimizer: Optimizer, *call: Any) -> None:
        """Count new storages where the optimizer steps: on the host if the shards are there.

        Args:
            optimizer: Optimizer that is about to step.
            *call: Other arguments of the hook.
        """
        self.previous_target = self.tracker.target
        if self.offloads_to_cpu:
            self.tracker.target = (MemoryLocation.HOST, None)

    def after_step(self, optimizer: Optimizer, *call: Any) -> None:
        """Label the optimizer state.

        Args:
            optimizer: Optimizer that has stepped.
            *call: Other arguments of the hook.
        """
        self.tracker.target = self.previous_target
        for state in optimizer_state_tensors(optimizer):
            self.tracker.label(state, MemoryKind.STATE)

    def begin(self, phase: str) -> None:
        """Start a phase.

        Args:
            phase: Name of the phase.
        """
        # Again in each phase, because a weight may have a new storage after a load.
        for weight in all_weights(self.trainer, self.algorithm) if phase != "load" else ():
            self.tracker.label(weight, MemoryKind.PARAMETERS)
        self.tracker.begin(phase)

    def end(self, phase: str) -> None:
        """End a phase.

        Args:
            phase: Name of the phase.
        """
        self.tracker.end(phase)

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
from lit_align.callbacks.memory import weights
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.offload import state_of
from lit_align.plan.dispatch_mode import Tracking, making
from lit_align.plan.gpu_kernels import KEPT, SCRATCH, SCRATCH_ON_CARD, counted_on_card
from lit_align.plan.max_length_data import Longest
from lit_align.plan.memory_tracker import Height, Kind, Ledger, Place
from lit_align.plan.patches import as_on_a_card, group_of, told, without_values
from lit_align.plan.stubs import Judge, Once, longest_answers, refuse_nothing, silent


class Machine(NamedTuple):
    """Where a run is to be.

    Args:
        ranks: Number of devices of all nodes.
        memory: Bytes of a device.
        is_card: Whether the device is a GPU, or the host itself.
        grouped: Whether ranks talk, even if there is one alone.
    """

    ranks: int = 1
    memory: int = 80 * 10**9
    is_card: bool = True
    grouped: bool = False


class Run(NamedTuple):
    """What is planned.

    Args:
        trainer: For one pass over `data`.
        algorithm: Not yet fitted.
        data: Batches of the longest texts.
    """

    trainer: Trainer
    algorithm: Algorithm
    data: Longest


Heights = dict[str, dict[Place, Height]]


def simulated(build: Callable[[], Run], machine: Machine) -> Heights:
    """The most bytes of each phase, of the first rank, by place and kind.

    Args:
        build: As in `traced`.
        machine: Where it is to be.
    """
    return traced(build, machine).heights


def traced(build: Callable[[], Run], machine: Machine) -> Ledger:
    """All that is written down of a run.

    Args:
        build: Makes the run; called where tensors have no values.
        machine: Where it is to be.
    """
    ledger = Ledger(counted_on_card if machine.is_card else int)
    with world(ledger, machine):
        run = build()
        prepare(run, ledger)
        run.trainer.fit(run.algorithm, run.data)
    return ledger


@contextmanager
def world(ledger: Ledger, machine: Machine) -> Iterator[None]:
    """All that makes tensors weightless and watched."""
    place = Place.HOST if machine.is_card else Place.DEVICE
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if machine.grouped:
            stack.enter_context(group_of(machine.ranks))
        stack.enter_context(told(ledger))
        stack.enter_context(without_values(ledger, machine.memory))
        if machine.is_card:
            stack.enter_context(as_on_a_card(ledger))
        stack.enter_context(making(ledger, Kind.PARAMETERS, place))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside, kept = (SCRATCH_ON_CARD, KEPT) if machine.is_card else (SCRATCH, 0)
        stack.enter_context(Tracking(ledger, inside, kept))
        yield


def prepare(run: Run, ledger: Ledger) -> None:
    """Puts the stand-ins into a run."""
    trainer, algorithm = run.trainer, run.algorithm
    silent(algorithm)
    refuse_nothing(algorithm)
    Once(algorithm)
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    for callback in callbacks:
        if isinstance(callback, Rollout):
            vars(callback)["measure"] = partial(longest_answers, callback)
        if isinstance(callback, Reward):
            vars(callback)["judge"] = Judge(callback, ledger)
    clerk = Clerk(ledger, run)
    callbacks.insert(0, clerk)
    algorithm.phase_listeners.append(clerk)
    vars(trainer.strategy).update(
        model_to_device=partial(clerk.arrive, algorithm),
        tensor_init_context=partial(clerk.built, trainer.strategy.tensor_init_context),
        setup_environment=real(trainer.strategy.setup_environment),
        teardown=lambda: None,
    )


def real(function: Callable[[], None]) -> Callable[[], None]:
    """Calls a function where tensors have values: a mesh of ranks is made of some."""

    def called() -> None:
        with _disable_current_modes():
            function()

    return called


class Clerk(Callback):
    """Says of weights, gradients and state that they are these; begins and ends phases.

    Args:
        ledger: To whom.
        run: Whose.
    """

    def __init__(self, ledger: Ledger, run: Run):
        self.ledger = ledger
        self.trainer, self.algorithm = run.trainer, run.algorithm
        strategy = run.trainer.strategy
        self.offloads = isinstance(strategy, FSDP2) and strategy.cpu_offload
        self.optimizers: list[Optimizer] = []

    @contextmanager
    def built(self, context: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        """Networks come into being on the device, unless they are split first.

        Args:
            context: The strategy's own.
        """
        place = None if isinstance(self.trainer.strategy, ModelParallelStrategy) else Place.DEVICE
        with making(self.ledger, place=place), context():
            yield

    def arrive(self, algorithm: LightningModule) -> None:
        """Networks come to the device, shards that sleep on the host apart."""
        for tensor in [*algorithm.parameters(), *algorithm.buffers()]:
            if not (self.offloads and isinstance(tensor, DTensor)):
                self.ledger.tell(tensor, Kind.PARAMETERS, Place.DEVICE)
        self.ledger.new = (Place.DEVICE, None)
        self.ledger.note("to the device")
        self.ledger.end("load")

    def on_fit_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Watches gradients and steps."""
        for weight in algorithm.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.register_post_accumulate_grad_hook(self.grown)
        self.optimizers = list(trainer.optimizers)
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self.step)
            optimizer.register_step_post_hook(self.stepped)

    def on_train_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """A step in advance, on gradients without a pass: state is there from the beginning."""
        self.begin("update")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.zeros_like(weight)
                    place = Place.HOST if self.offloads else None
                    self.ledger.tell(weight.grad, Kind.GRADIENTS, place)
            optimizer.step()
            optimizer.zero_grad()
        self.end("update")
        self.has_state = all(optimizer.state for optimizer in self.optimizers)

    def on_train_batch_end(self, trainer: Trainer, *hook: Any) -> None:
        """One batch is enough, unless state comes in backward."""
        trainer.should_stop = self.has_state

    def grown(self, weight: Tensor) -> None:
        """A gradient is complete."""
        if weight.grad is not None:
            self.ledger.tell(weight.grad, Kind.GRADIENTS)

    def step(self, optimizer: Optimizer, *call: Any) -> None:
        """The optimizer steps where its weights are."""
        self.before = self.ledger.new
        if self.offloads:
            self.ledger.new = (Place.HOST, None)

    def stepped(self, optimizer: Optimizer, *call: Any) -> None:
        """State is there."""
        self.ledger.new = self.before
        for state in state_of(optimizer):
            self.ledger.tell(state, Kind.STATE)

    def begin(self, phase: str) -> None:
        """A phase begins, of the algorithm's."""
        for weight in weights(self.trainer, self.algorithm) if phase != "load" else ():
            self.ledger.tell(weight, Kind.PARAMETERS)
        self.ledger.begin(phase)

    def end(self, phase: str) -> None:
        """A phase is over."""
        self.ledger.end(phase)

"""Every tensor that is made is written down: a dispatch mode above fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker

aten = torch.ops.aten
MATMULS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default}
GRADIENT_SUMS = {aten.add.Tensor, aten.clone.default, aten.new_empty_strided.default}


class AllocationMode(TorchDispatchMode):
    """Writes each new storage into a tracker, and answers where a value is asked for.

    Fake tensors have no values. Whoever reads one gets 1, or False of a bool; whoever asks which
    are not zero gets all. So no answer ever stops before its last token.

    Args:
        tracker: What is written.
        scratch_sizes: Bytes that an operator takes inside and gives back, of its arguments.
        workspace_bytes: Bytes that a library of products takes of the device and keeps, per thread.
    """

    def __init__(
        self,
        tracker: MemoryTracker,
        scratch_sizes: dict[Any, Callable[..., int]],
        workspace_bytes: int = 0,
    ):
        super().__init__()
        self.tracker, self.scratch_sizes, self.workspace_bytes = (
            tracker,
            scratch_sizes,
            workspace_bytes,
        )
        self.workspaces: dict[bool, Tensor] = {}  # by whether backward's thread has them

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator and counts what it has made."""
        if DTensor in types:
            return NotImplemented
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) for each in inputs):
            with _disable_current_modes():  # ranks of a mesh have values
                return function(*args, **(kwargs or {}))
        if function is aten._local_scalar_dense.default:
            return placeholder_value(args[0].dtype)
        if function is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if (
            self.workspace_bytes
            and function in MATMULS
            and self.tracker.target[0] is MemoryLocation.DEVICE
        ):
            self.allocate_workspace(torch._C._current_graph_task_id() != -1)
        result = function(*args, **(kwargs or {}))
        kind = MemoryKind.ACTIVATIONS if torch.is_grad_enabled() else MemoryKind.TEMPORARIES
        new = [
            self.tracker.track(tensor.untyped_storage(), kind) for tensor in result_tensors(result)
        ]
        if any(new) and not is_autograd_accumulation(function):
            self.tracker.update_peaks(function, self.scratch_size(function, args))
        return result

    def allocate_workspace(self, backward: bool) -> None:
        """A thread multiplies: it has a workspace from the first time on."""
        if backward not in self.workspaces:
            self.workspaces[backward] = torch.empty(self.workspace_bytes, dtype=torch.uint8)
            self.tracker.label(self.workspaces[backward], MemoryKind.TEMPORARIES)

    def scratch_size(self, function: Any, args: Any) -> int:
        """Bytes that an operator takes and gives back."""
        count = self.scratch_sizes.get(function)
        return count(*args) if count else 0


def placeholder_value(dtype: torch.dtype) -> float | int | bool:
    """What is answered where a value is asked for."""
    if dtype is torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def result_tensors(result: Any) -> Iterator[Tensor]:
    """The tensors that an operator returns."""
    for each in result if isinstance(result, list | tuple) else (result,):
        if isinstance(each, Tensor):
            yield each


def is_autograd_accumulation(function: Any) -> bool:
    """Whether autograd adds up gradients: real ones in place, fake ones into a new tensor.

    The old one is gone before anything else is made, and counted no longer by then.
    """
    if function not in GRADIENT_SUMS or torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is None or node.name() == "torch::autograd::AccumulateGrad"


@contextmanager
def attribute_to(
    tracker: MemoryTracker, kind: MemoryKind | None = None, location: MemoryLocation | None = None
) -> Iterator[None]:
    """What is made inside is for this, or there.

    Args:
        tracker: Where it is written.
        kind: What for; None leaves it.
        location: Where; None leaves it.
    """
    before = tracker.target
    tracker.target = (location or before[0], kind or before[1])
    try:
        yield
    finally:
        tracker.target = before

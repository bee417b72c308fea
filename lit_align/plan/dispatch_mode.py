"""Dispatch mode above fake tensors that tracks the memory of every operator."""

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

from lit_align.plan.gpu_kernels import aten
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker

# The dispatch mode is checked with torch 2.13: fake tensors, `torch._C._current_graph_task_id`
# (-1 outside of backward), `torch._C._current_autograd_node` and `_disable_current_modes` are
# private.
MATMULS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default}
GRADIENT_SUMS = {aten.add.Tensor, aten.clone.default, aten.new_empty_strided.default}


class AllocationMode(TorchDispatchMode):
    """Track each new storage, and replace the values that fake tensors do not have.

    A number read from a fake tensor is 1, a bool is False. `nonzero` returns all indices. Therefore
    responses never stop early.

    Args:
        tracker: Tracker of storages and peaks.
        scratch_sizes: By operator, a function of its arguments that returns the bytes it allocates
            and frees inside.
        workspace_bytes: Bytes that cuBLAS allocates per thread and keeps. Default: none.
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
        # True for the thread of backward passes, which has its own cuBLAS handle.
        self.workspaces: dict[bool, Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and track its results.

        Args:
            function: Operator.
            types: Tensor subclasses among the arguments.
            args: Arguments of the operator.
            kwargs: Keyword arguments of the operator.
        """
        if DTensor in types:
            return NotImplemented  # DTensor calls operators of its local tensors, which come here
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) for each in inputs):
            # Real tensors, such as the ranks of a device mesh, whose values are needed.
            with _disable_current_modes():
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
        # In a forward pass with gradients a result may be kept for backward. Backward itself runs
        # without gradients.
        kind = MemoryKind.ACTIVATIONS if torch.is_grad_enabled() else MemoryKind.TEMPORARIES
        new = [
            self.tracker.track(tensor.untyped_storage(), kind) for tensor in result_tensors(result)
        ]
        if any(new) and not is_autograd_accumulation(function):
            self.tracker.update_peaks(function, self.scratch_size(function, args))
        return result

    def allocate_workspace(self, backward: bool) -> None:
        """Allocate the workspace of a thread on its first matrix product.

        Args:
            backward: True for the thread of backward passes.
        """
        if backward not in self.workspaces:
            self.workspaces[backward] = torch.empty(self.workspace_bytes, dtype=torch.uint8)
            self.tracker.label(self.workspaces[backward], MemoryKind.TEMPORARIES)

    def scratch_size(self, function: Any, args: Any) -> int:
        """Return the bytes that an operator allocates and frees inside.

        Args:
            function: Operator.
            args: Arguments of the operator.
        """
        count = self.scratch_sizes.get(function)
        return count(*args) if count else 0


def placeholder_value(dtype: torch.dtype) -> float | int | bool:
    """Return the value of an element of a fake tensor.

    Args:
        dtype: Dtype of the tensor.

    Example:
        >>> placeholder_value(torch.bool), placeholder_value(torch.int64)
        (False, 1)
    """
    if dtype is torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def result_tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operator returns.

    Args:
        result: A tensor, a list or tuple of results, or anything else.

    Example:
        >>> [tensor.item() for tensor in result_tensors((torch.tensor(1), None, torch.tensor(2)))]
        [1, 2]
    """
    for each in result if isinstance(result, list | tuple) else (result,):
        if isinstance(each, Tensor):
            yield each


def is_autograd_accumulation(function: Any) -> bool:
    """Return True if autograd is accumulating a gradient.

    Args:
        function: Operator that was run.
    """
    # Autograd adds real gradients in place, but fake ones into a new tensor. The sum of both would
    # be a peak that a real run does not have.
    if function not in GRADIENT_SUMS or torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is None or node.name() == "torch::autograd::AccumulateGrad"


@contextmanager
def attribute_to(
    tracker: MemoryTracker, kind: MemoryKind | None = None, location: MemoryLocation | None = None
) -> Iterator[None]:
    """Assign new storages to a kind and a location inside the block.

    Args:
        tracker: Tracker of storages.
        kind: Kind of the storages. None keeps the current one.
        location: Location of the storages. None keeps the current one.
    """
    before = tracker.target
    tracker.target = (location or before[0], kind or before[1])
    try:
        yield
    finally:
        tracker.target = before

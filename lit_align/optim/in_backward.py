"""Optimizer steps during backward, so that at most one parameter has a gradient at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor


class OptimizerInBackward:
    """Hooks that update each parameter when its gradient is complete, and free the gradient.

    Only one backward per optimizer `step` is allowed: each of k micro-batches would make its own
    step on a gradient that is k times too small.

    Args:
        update: Method of an optimizer that updates a parameter, given the index of its group, the
            parameter and its gradient. Stored as a weak reference. If the optimizer is
            deleted, the hooks do nothing.

    Example:
        >>> import torch
        >>> from lit_align.optim.galore import GaLore
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = GaLore([("weight", weight)], lr=0.5, rank=None, per_layer=True)
        >>> weight.sum().backward()
        >>> weight.grad is None, (weight < 0).tolist()
        (True, [True, True])
    """

    def __init__(self, update: Callable[[int, Tensor, Tensor], None]):
        self.update = weakref.WeakMethod(update)
        self.updated: set[Tensor] = set()

    def register_hooks(self, params: Iterable[Tensor], group_index: int) -> None:
        """Update parameters during every backward that follows.

        Args:
            params: Parameters of a group.
            group_index: Index of the group in `param_groups`. Resuming replaces the group itself.
        """
        for param in params:
            param.register_post_accumulate_grad_hook(partial(self.update_param, group_index))

    def update_param(self, group_index: int, param: Tensor) -> None:
        """Update one parameter [..] whose gradient is complete."""
        update = self.update()
        if update is None:
            return
        is_distributed = distributed.is_initialized() and distributed.get_world_size() > 1
        if is_distributed and not isinstance(param, DTensor):
            raise ValueError(
                "per_layer under DDP would step on the gradient of one rank. Shard with FSDP2, or "
                "remove per_layer."
            )
        if param in self.updated:
            raise ValueError(
                "per_layer steps during backward and allows one backward per step, found a second. "
                "Set a larger microbatch_tokens so that a batch is one micro-batch, or remove "
                "per_layer."
            )
        if param.grad is None:
            raise ValueError(
                "per_layer found no gradient: another optimizer has freed it. Use one optimizer "
                "with per_layer."
            )
        self.updated.add(param)
        update(group_index, param, param.grad)
        param.grad = None

    def reset(self, *call: Any) -> None:
        """Allow the next backward. Call it after the `step` of the optimizer."""
        self.updated.clear()

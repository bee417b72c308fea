"""Steps inside of backward: no more than one parameter's gradient is there at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor


class OptimizerInBackward:
    """Updates each watched parameter as soon as its gradient is complete, and frees the gradient.

    A second gradient before the optimizer's `step` is refused: k micro-batches would make k steps
    on a k-th of the gradient each.

    Args:
        update: An optimizer's method that updates a parameter, from its group's number, the
            parameter and its gradient. Once the optimizer is gone, its parameters are left alone.
    """

    def __init__(self, update: Callable[[int, Tensor, Tensor], None]):
        self.update = weakref.WeakMethod(update)
        self.updated: set[Tensor] = set()

    def register_hooks(self, params: Iterable[Tensor], number: int) -> None:
        """Updates parameters in backward from now on.

        Args:
            params: The parameters of a group.
            number: The group's; the group itself is another object after a resume.
        """
        for param in params:
            param.register_post_accumulate_grad_hook(partial(self.update_param, number))

    def update_param(self, number: int, param: Tensor) -> None:
        """Updates one parameter, whose gradient has just become complete."""
        update = self.update()
        if update is None:
            return
        is_distributed = distributed.is_initialized() and distributed.get_world_size() > 1
        if is_distributed and not isinstance(param, DTensor):
            raise ValueError(
                "per_layer under DDP would step on the gradient of one rank: shard with FSDP2, or "
                "leave per_layer out."
            )
        if param in self.updated:
            raise ValueError(
                "per_layer steps during backward, and a step may have one backward only: raise "
                "microbatch_tokens until a batch is one micro-batch, or leave per_layer out."
            )
        if param.grad is None:
            raise ValueError("per_layer: another optimizer has taken this parameter's gradient.")
        self.updated.add(param)
        update(number, param, param.grad)
        param.grad = None

    def reset(self, *call: Any) -> None:
        """Allows the next backward; to be called after the optimizer's `step`."""
        self.updated.clear()

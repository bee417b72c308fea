"""Patches of caches, collectives and storages that report memory to the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Private to torch; checked with 2.13.
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import DynamicCache

from lit_align.models.generation import prefill
from lit_align.models.generation.static_cache import StaticDecodeState
from lit_align.plan.dispatch_mode import attribute_to
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker


@contextmanager
def patch(owner: Any, **replacements: Any) -> Iterator[None]:
    """Replace attributes of an object, class or module inside the block.

    Args:
        owner: Object whose attributes are replaced.
        **replacements: New values by name.

    Example:
        >>> class Settings:
        ...     size = 1
        >>> with patch(Settings, size=2):
        ...     Settings.size
        2
    """
    before = {name: getattr(owner, name) for name in replacements}
    for name, new in replacements.items():
        setattr(owner, name, new)
    try:
        yield
    finally:
        for name, old in before.items():
            setattr(owner, name, old)


@contextmanager
def track_patched_calls(tracker: MemoryTracker) -> Iterator[None]:
    """Report KV caches, collectives and storages of changed size to the tracker.

    Args:
        tracker: Tracker of storages.
    """
    resize = torch.UntypedStorage.resize_
    infer_shape = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_and_track(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        tracker.update_size(storage)
        return storage

    def infer_shape_untracked(*args: Any) -> Any:
        # DTensor infers shapes by running operators on fake tensors of the unsharded size.
        with tracker.ignore_allocations():
            return infer_shape(*args)

    with ExitStack() as stack:
        stack.enter_context(
            patch(ShardingPropagator, _propagate_tensor_meta_non_cached=infer_shape_untracked)
        )
        # FSDP2 frees gathered weights by resizing their storage to 0, without any operator.
        stack.enter_context(patch(torch.UntypedStorage, resize_=resize_and_track))
        stack.enter_context(patch(FSDPParamGroup, **collective_patches(tracker)))
        cached = attribute_methods(
            tracker, MemoryKind.CACHE, DynamicCache, "update", "batch_select_indices"
        )
        stack.enter_context(patch(DynamicCache, **cached))
        stack.enter_context(
            patch(prefill, **attribute_methods(tracker, MemoryKind.CACHE, prefill, "concat_caches"))
        )
        static = attribute_methods(tracker, MemoryKind.CACHE, StaticDecodeState, "allocate_static")
        stack.enter_context(patch(StaticDecodeState, **static))
        yield


def attribute_methods(
    tracker: MemoryTracker, kind: MemoryKind, owner: Any, *names: str
) -> dict[str, Callable[..., Any]]:
    """Return wrapped methods whose new storages count as one kind on the device.

    Args:
        tracker: Tracker of storages.
        kind: Kind of the storages.
        owner: Class or module.
        *names: Names of its methods or functions.
    """

    def with_attribution(method: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with attribute_to(tracker, kind, MemoryLocation.DEVICE):
                return method(*args, **kwargs)

        return inside

    return {name: with_attribution(getattr(owner, name)) for name in names}


def collective_patches(tracker: MemoryTracker) -> dict[str, Callable[..., Any]]:
    """Return wrapped methods of FSDP2 that count gathered weights and label gradients.

    Args:
        tracker: Tracker of storages.
    """
    names = ("unshard", "wait_for_unshard", "post_backward")
    marked = attribute_methods(tracker, MemoryKind.GATHERED, FSDPParamGroup, *names)
    reduce = marked["post_backward"]

    def post_backward(group: FSDPParamGroup, *unused: Any) -> None:
        reduce(group, *unused)
        for param in group.fsdp_params:
            # Micro-batches that do not reduce leave an unsharded gradient.
            accumulated = getattr(param, "unsharded_accumulated_grad", None)
            for gradient in (param.sharded_param.grad, accumulated):
                if gradient is not None:
                    tracker.label(gradient, MemoryKind.GRADIENTS)

    return {**marked, "post_backward": post_backward}

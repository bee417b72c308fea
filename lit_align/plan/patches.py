"""What a planned run believes: that there are N ranks, a card, and no need of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.functional import rms_norm
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, PreTrainedModel, masking_utils

from lit_align.errors import UserError
from lit_align.functional import logprobs
from lit_align.models import backbone, policy
from lit_align.models.generation import prefill
from lit_align.models.generation.static_cache import StaticDecodeState
from lit_align.models.kernels import rms_norm as norms
from lit_align.models.kernels import varlen_attention
from lit_align.models.parallel import sharding
from lit_align.models.parallel.offload import OffloadedTensors, is_pinned_to_device
from lit_align.models.policy import Policy
from lit_align.plan.architectures import build_without_weights
from lit_align.plan.decode_steps import decode_first_and_last, prefill_first_and_last
from lit_align.plan.dispatch_mode import attribute_to
from lit_align.plan.gpu_kernels import gpu_attention, gpu_rms_norm
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker
from lit_align.rewards import reward_model as learned

compare_norms = norms.outputs_match  # as it is outside of a plan


class FakeCluster(ClusterEnvironment):
    """The first of N ranks, of which nobody starts the replacements.

    Args:
        ranks: N.
        per_node: Ranks of a node.
    """

    def __init__(self, ranks: int, per_node: int):
        super().__init__()
        self.ranks, self.per_node = ranks, per_node

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0

    @staticmethod
    def detect() -> bool:
        """Is never found, only given."""
        return False

    def world_size(self) -> int:
        """N."""
        return self.ranks

    def set_world_size(self, size: int) -> None:
        """It is known already."""

    def global_rank(self) -> int:
        """The first, which has the largest share."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """It is known already."""

    def local_rank(self) -> int:
        """The first."""
        return 0

    def node_rank(self) -> int:
        """The first."""
        return 0


@contextmanager
def fake_process_group(ranks: int) -> Iterator[None]:
    """A process group of so many ranks in which nobody answers."""
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # equal meshes share its answers, which are of this rank


@contextmanager
def patch(owner: Any, **replacements: Any) -> Iterator[None]:
    """Other attributes for a while."""
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
    """Caches, collective_patches and storages that change their size say so to the tracker."""
    resize = torch.UntypedStorage.resize_
    shape_of = ShardingPropagator._propagate_tensor_meta_non_cached

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        tracker.update_size(storage)
        return storage

    def infer_shape_untracked(*args: Any) -> Any:  # tensors of whole shapes without memory
        with tracker.ignore_allocations():
            return shape_of(*args)

    with ExitStack() as stack:
        stack.enter_context(
            patch(ShardingPropagator, _propagate_tensor_meta_non_cached=infer_shape_untracked)
        )
        stack.enter_context(patch(torch.UntypedStorage, resize_=resized))
        stack.enter_context(patch(FSDPParamGroup, **collective_patches(tracker)))
        cached = attribute_methods(
            tracker, MemoryKind.CACHE, DynamicCache, "update", "batch_select_indices"
        )
        stack.enter_context(patch(DynamicCache, **cached))
        stack.enter_context(
            patch(prefill, **attribute_methods(tracker, MemoryKind.CACHE, prefill, "concat_caches"))
        )
        fixed = attribute_methods(tracker, MemoryKind.CACHE, StaticDecodeState, "allocate_static")
        stack.enter_context(patch(StaticDecodeState, **fixed))
        yield


def attribute_methods(
    tracker: MemoryTracker, kind: MemoryKind, owner: Any, *names: str
) -> dict[str, Callable[..., Any]]:
    """Methods of a class or functions of a module, by name, that fill one category."""

    def with_attribution(method: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with attribute_to(tracker, kind, MemoryLocation.DEVICE):
                return method(*args, **kwargs)

        return inside

    return {name: with_attribution(getattr(owner, name)) for name in names}


def collective_patches(tracker: MemoryTracker) -> dict[str, Callable[..., Any]]:
    """FSDP2's, by name: what they gather, and the gradients that they leave."""
    names = ("unshard", "wait_for_unshard", "post_backward")
    marked = attribute_methods(tracker, MemoryKind.GATHERED, FSDPParamGroup, *names)
    reduce = marked["post_backward"]

    def post_backward(group: FSDPParamGroup, *unused: Any) -> None:
        reduce(group, *unused)
        for param in group.fsdp_params:
            accumulated = getattr(param, "unsharded_accumulated_grad", None)
            for gradient in (param.sharded_param.grad, accumulated):
                if gradient is not None:
                    tracker.label(gradient, MemoryKind.GRADIENTS)

    return {**marked, "post_backward": post_backward}


@contextmanager
def fake_tensor_patches(tracker: MemoryTracker, memory: int) -> Iterator[None]:
    """Weights are not compared, answers run to their end, and `memory` bytes are to be had."""

    def fits(model: nn.Module, unsharded_size: int) -> bool:
        free = memory - tracker.total[MemoryLocation.DEVICE]
        return sharding.memory_headroom(model, unsharded_size, free) >= 0

    def load(*args: Any) -> tuple[PreTrainedModel, list[str], None]:
        # where ranks share weights, each reads its own rows alone, once it knows which
        with tracker.ignore_allocations() if args[-1] else nullcontext():
            return build_without_weights(*args)

    search = masking_utils.find_packed_sequence_indices

    def no_packed_rows(positions: Tensor) -> None:
        search(positions)

    with ExitStack() as stack:
        stack.enter_context(patch(FakeTensor, __deepcopy__=deepcopy_fake_tensor))
        stack.enter_context(patch(nn.Module, _apply=apply_to_fake_weights))
        stack.enter_context(patch(masking_utils, find_packed_sequence_indices=no_packed_rows))
        stack.enter_context(patch(backbone, load_network=load))
        stack.enter_context(patch(learned, load_tokenizer=lambda *given: None))
        stack.enter_context(patch(policy, decode=decode_first_and_last, all_reduce_max=int))
        stack.enter_context(patch(prefill, prefill_chunks=prefill_first_and_last))
        stack.enter_context(patch(Policy, verify_weights=verify_from_config))
        stack.enter_context(patch(norms, outputs_match=outputs_match_outside_plan))
        stack.enter_context(patch(sharding, unsharded_weights_fit=fits))
        for module in (torch_optimizer, _foreach_utils):  # fake weights are steps' lists, too
            kinds = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch(module, _foreach_supported_types=kinds))
        yield


@torch.no_grad()
def verify_from_config(network: Policy) -> None:
    """`Policy.verify_weights` by what the configuration says."""
    if getattr(network.network.config, "final_logit_softcapping", None):
        raise UserError(
            f"{network.name} changes its logits after the output head: soft-capped or scaled "
            f"logits are not supported."
        )
    if not network.defers_loading:
        network(network._head_difference)


def outputs_match_outside_plan(norm: nn.Module, other: nn.Module, eps: float) -> bool:
    """`norms.outputs_match` of real numbers and by the real function, where a plan has neither."""
    with _disable_current_modes(), patch(norms, rms_norm=rms_norm):
        return compare_norms(norm, other, eps)


def apply_to_fake_weights(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` for fake weights, which torch's own would swap; most changes are none."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, weight in module._parameters.items():
        if weight is not None:
            with torch.no_grad():
                other = change(weight)
            if other is not weight:
                module._parameters[name] = nn.Parameter(other, weight.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def deepcopy_fake_tensor(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`deepcopy` of a fake tensor; torch's own would copy the mode that it belongs to."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
    found: Tensor = memo[id(tensor)]
    return found


@contextmanager
def gpu_patches(tracker: MemoryTracker) -> Iterator[None]:
    """Kernels, optimizers and parking as on a GPU, of tensors that are on the CPU."""
    host_copies: dict[OffloadedTensors, dict[Tensor, Tensor]] = {}

    def offload(sleeper: OffloadedTensors) -> None:
        copies = host_copies.setdefault(sleeper, {})
        for tensor in sleeper.tensors():
            if isinstance(tensor, DTensor) or is_pinned_to_device(tensor):
                continue
            if tensor not in copies:
                with attribute_to(tracker, MemoryKind.PARAMETERS, MemoryLocation.HOST):
                    copies[tensor] = torch.empty_like(tensor)
            tracker.release(tensor)

    def reload(sleeper: OffloadedTensors) -> None:
        for tensor in host_copies.get(sleeper, {}):
            tracker.restore(tensor)

    def supported_devices() -> list[str]:
        return ["cpu"]

    original = Policy.uses_static_cache

    def uses_static_cache_on_gpu(policy: Policy, device: torch.device) -> bool:
        return original(policy, torch.device("cuda"))

    with ExitStack() as stack:
        stack.enter_context(patch(OffloadedTensors, offload=offload, reload=reload))
        stack.enter_context(patch(torch.nn.functional, scaled_dot_product_attention=gpu_attention))
        stack.enter_context(patch(norms, rms_norm=gpu_rms_norm))
        stack.enter_context(patch(Policy, uses_static_cache=uses_static_cache_on_gpu))
        stack.enter_context(patch(varlen_attention, has_varlen_kernel=lambda kind: True))
        stack.enter_context(patch(logprobs, _has_fp32_accumulation=lambda device: True))
        for module in (torch_optimizer, _foreach_utils):
            stack.enter_context(
                patch(module, _get_foreach_kernels_supported_devices=supported_devices)
            )
        yield

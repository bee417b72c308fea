"""Patches that let training code run on fake tensors, as rank 0 of N ranks and as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Private to torch: fake tensors, foreach lists and dispatch modes. Checked with 2.13.
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import rms_norm
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel, masking_utils

from lit_align.errors import UserError
from lit_align.functional import logprobs
from lit_align.models import backbone, policy
from lit_align.models.generation import prefill
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
from lit_align.plan.tracking_patches import patch
from lit_align.rewards import reward_model as learned

compare_norms = norms.outputs_match  # the original, which a patch replaces


@contextmanager
def fake_tensor_patches(tracker: MemoryTracker, memory: int) -> Iterator[None]:
    """Patch all code that needs values of tensors, files of weights or a second rank.

    Args:
        tracker: Tracker of storages.
        memory: Memory of a device in bytes.
    """

    def fits(model: nn.Module, unsharded_size: int) -> bool:
        free = memory - tracker.total[MemoryLocation.DEVICE]
        return sharding.memory_headroom(model, unsharded_size, free) >= 0

    def load(*args: Any) -> tuple[PreTrainedModel, list[str], None]:
        # With deferred loading, each rank reads only its own rows after the split.
        with tracker.ignore_allocations() if args[-1] else nullcontext():
            return build_without_weights(*args)

    search = masking_utils.find_packed_sequence_indices

    def no_packed_rows(positions: Tensor) -> None:
        search(positions)  # only for its memory: these positions contain no packed rows

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
        # Optimizers step on lists of tensors only for known types.
        for module in (torch_optimizer, _foreach_utils):
            kinds = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch(module, _foreach_supported_types=kinds))
        yield


@torch.no_grad()
def verify_from_config(network: Policy) -> None:
    """Replace `Policy.verify_weights`: check the configuration instead of the logits.

    Args:
        network: Policy whose weights have no values.
    """
    if getattr(network.network.config, "final_logit_softcapping", None):
        raise UserError(
            f"{network.name} changes its logits after the output head: soft-capped or scaled "
            f"logits are not supported. Use another model."
        )
    # Run the check although it has no result: its memory belongs to the load phase.
    if not network.defers_loading:
        network(network._head_difference)


def outputs_match_outside_plan(norm: nn.Module, other: nn.Module, eps: float) -> bool:
    """Replace `outputs_match`: compare two norms on real tensors and with the real function.

    Args:
        norm: Norm of a network.
        other: Candidate replacement.
        eps: Number that both add to the mean of squares.
    """
    with _disable_current_modes(), patch(norms, rms_norm=rms_norm):
        return compare_norms(norm, other, eps)


def apply_to_fake_weights(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Replace `Module._apply` for fake weights.

    Args:
        module: Module, changed in place.
        change: Function of each weight and buffer.
        recurse: Change the children, too.
    """
    # torch's version swaps tensors in place. Here a new parameter is made, but only if the
    # function has returned another tensor.
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
    """Replace `deepcopy` of a fake tensor, which would copy its mode as well.

    Args:
        tensor: Fake tensor of any shape.
        memo: Copies that were made already, by `id`.

    Returns:
        Fake tensor of the same shape and mode.
    """
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
    found: Tensor = memo[id(tensor)]
    return found


@contextmanager
def gpu_patches(tracker: MemoryTracker) -> Iterator[None]:
    """Run kernels, optimizers and offloading as on a GPU, with fake tensors on the CPU.

    Args:
        tracker: Tracker of storages.
    """
    host_copies: dict[OffloadedTensors, dict[Tensor, Tensor]] = {}

    def offload(tensors: OffloadedTensors) -> None:
        copies = host_copies.setdefault(tensors, {})
        for tensor in tensors.tensors():
            # Not `can_offload`, because every fake tensor is on the CPU.
            if isinstance(tensor, DTensor) or is_pinned_to_device(tensor):
                continue
            if tensor not in copies:
                with attribute_to(tracker, MemoryKind.PARAMETERS, MemoryLocation.HOST):
                    copies[tensor] = torch.empty_like(tensor)
            tracker.release(tensor)

    def reload(tensors: OffloadedTensors) -> None:
        for tensor in host_copies.get(tensors, {}):
            tracker.restore(tensor)

    def supported_devices() -> list[str]:
        return ["cpu"]

    original = Policy.uses_static_cache

    def uses_static_cache_on_gpu(network: Policy, device: torch.device) -> bool:
        return original(network, torch.device("cuda"))

    with ExitStack() as stack:
        stack.enter_context(patch(OffloadedTensors, offload=offload, reload=reload))
        stack.enter_context(patch(torch.nn.functional, scaled_dot_product_attention=gpu_attention))
        stack.enter_context(patch(norms, rms_norm=gpu_rms_norm))
        stack.enter_context(patch(Policy, uses_static_cache=uses_static_cache_on_gpu))
        stack.enter_context(patch(varlen_attention, has_varlen_kernel=lambda kind: True))
        stack.enter_context(patch(logprobs, _has_fp32_accumulation=lambda device: True))
        # A GPU's optimizer steps on lists of tensors, with temporaries of all weights at once.
        for module in (torch_optimizer, _foreach_utils):
            stack.enter_context(
                patch(module, _get_foreach_kernels_supported_devices=supported_devices)
            )
        yield

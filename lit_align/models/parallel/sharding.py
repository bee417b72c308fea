"""FSDP2 in three verbs: shard a model once, synchronise its gradients, gather it to generate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lit_align.models.weights.sharded_loading import WeightFiles


class ShardingConfig(NamedTuple):
    """How networks are split over ranks.

    Args:
        param_dtype: Type that a block's weights are gathered in, if not their own. Embedding,
            last norm and heads always are gathered as they are: under autocast the unsharded
            residual stream and logits are fp32, too.
        reduce_dtype: Type in which gradients are summed over ranks, where it is not their own.
        cpu_offload: Shards sleep in host memory.
        activation_checkpointing: Blocks keep their inputs alone.
        gather_for_generation: Whether to gather all weights; None asks an estimate.
        sync_every_microbatch: Average gradients over the ranks after each micro-batch.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    gather_for_generation: bool | None = None
    sync_every_microbatch: bool = False


@dataclass
class ShardState:
    """The facts about a network that sharding needs after the split.

    The defaults are those of a network that is not sharded.

    Args:
        weight_files: Files of weights that have no values yet.
        gather_for_generation: Whether the unsharded weights are gathered to generate. None means
            that `decide_gather` has to estimate it.
        sync_every_microbatch: Whether gradients are averaged over the ranks after each micro-batch,
            and not only after the last.
        unsharded_size: Bytes of the gathered weights.
    """

    weight_files: WeightFiles | None = None
    gather_for_generation: bool | None = True
    sync_every_microbatch: bool = False
    unsharded_size: int = 0

    def decide_gather(self, model: nn.Module, name: str) -> bool:
        """Return whether to gather the unsharded weights; an estimate is made once and kept.

        Args:
            model: Network that this state belongs to.
            name: Name of the network in the warning.
        """
        if self.gather_for_generation is None:
            self.gather_for_generation = unsharded_weights_fit(model, self.unsharded_size)
            if not self.gather_for_generation:
                rank_zero_warn(
                    f"Whole weights of {name} ({self.unsharded_size / 2**30:.1f} GiB) would take "
                    f"more than half of the free memory: answers are generated from shards. Each "
                    f"token then gathers every block, and all ranks go on until the longest answer "
                    f"of any has ended: several times slower. `gather_for_generation: true` of FSDP2 gathers all "
                    f"the same."
                )
        return self.gather_for_generation


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: ShardingConfig
) -> ShardState:
    """Split the weights over the ranks of a mesh, block by block.

    Args:
        model: Network, built and not yet sharded.
        blocks: Its transformer blocks.
        mesh: Lightning's mesh with a tensor-parallel size of 1, or a mesh of replicas x shards.
        config: Settings of the split.
    """
    state = ShardState(
        gather_for_generation=config.gather_for_generation,
        sync_every_microbatch=config.sync_every_microbatch,
        unsharded_size=unsharded_size(model, blocks, config.param_dtype),
    )
    names = mesh.mesh_dim_names or ()
    data_mesh = mesh["data_parallel"] if "data_parallel" in names else mesh
    offload = (
        CPUOffloadPolicy(pin_memory=data_mesh.device_type != "cpu")
        if config.cpu_offload
        else OffloadPolicy()
    )
    param_dtype = MixedPrecisionPolicy(
        config.param_dtype, config.reduce_dtype, cast_forward_inputs=False
    )
    root = MixedPrecisionPolicy(None, config.reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=data_mesh, mp_policy=param_dtype, offload_policy=offload)
    # what trains keeps its embedding and heads for the backward pass, which ends in resharding
    keeps_unsharded = any(weight.requires_grad for weight in model.parameters())
    fully_shard(
        model,
        mesh=data_mesh,
        reshard_after_forward=not keeps_unsharded,
        mp_policy=root,
        offload_policy=offload,
    )
    return state


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The parts of `model` that are gathered one at a time; none if it is whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Leaves shards alone registered: after a pass without backward the root still is whole."""
    for module in fsdp_modules(model):
        module.reshard()


def set_gradient_sync(model: nn.Module, state: ShardState, last: bool) -> None:
    """Set whether the next backward averages gradients over the ranks, or only adds them up here.

    Args:
        model: Network; nothing is set if it is not sharded.
        state: Shard state of the network.
        last: Whether no micro-batch follows.
    """
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(last or state.sync_every_microbatch, recurse=False)


def unsharded_size(
    model: nn.Module, blocks: Iterable[nn.Module], param_dtype: torch.dtype | None
) -> int:
    """Return the bytes of the gathered weights.

    Args:
        model: Network, not yet sharded.
        blocks: Its transformer blocks.
        param_dtype: Dtype of the gathered blocks. None means their own.
    """
    in_blocks = {weight for block in blocks for weight in block.parameters()}
    return sum(
        weight.numel()
        * (param_dtype if param_dtype and weight in in_blocks else weight.dtype).itemsize
        for weight in model.parameters()
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take; on a CPU, its part of what the machine has free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return (
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.get_world_size()
    )


def unsharded_weights_fit(model: nn.Module, unsharded_size: int) -> bool:
    """Return whether gathered weights take at most half of the memory that training leaves.

    This holds on every rank or on none.

    Args:
        model: Sharded network.
        unsharded_size: Bytes of the gathered weights.
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    device = torch.device(weights[0].device_mesh.device_type)
    left = memory_headroom(model, unsharded_size, free_memory(device))
    headroom = torch.tensor(left, dtype=torch.float64, device=device)
    distributed.all_reduce(headroom, op=distributed.ReduceOp.MIN)
    return bool(headroom >= 0)


def memory_headroom(model: nn.Module, unsharded_size: int, free: int) -> float:
    """Return half of the memory that training leaves, minus the gathered weights, in bytes.

    Gradients and AdamW's moments may not exist yet: they take three times the trained shards. The
    other half is for keys, values and activations.

    Args:
        model: Sharded network.
        unsharded_size: Bytes of the gathered weights.
        free: Bytes that this rank may still allocate.
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    local = [weight.to_local() for weight in weights if weight.requires_grad]
    return (free - 3 * sum(weight.nbytes for weight in local)) / 2 - unsharded_size


def all_reduce_and(condition: bool) -> bool:
    """Whether something is so on every rank; each of them has to ask."""
    return not all_reduce_max(not condition)


def all_reduce_max(number: int) -> int:
    """A number where it is largest of all ranks; each of them has to ask."""
    accelerator = torch.accelerator.current_accelerator()
    numbers = torch.tensor(int(number), device=accelerator or "cpu")
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)


@contextmanager
def gather_weights(model: nn.Module, is_gathered: bool) -> Iterator[None]:
    """Keep a network in eval mode and, if asked, its unsharded weights in memory.

    A generated token then costs no collective.

    Args:
        model: Network, sharded or not.
        is_gathered: Whether to gather the weights.
    """
    modes = [module.training for module in model.modules()]
    unsharded = fsdp_modules(model) if is_gathered else []
    keeps_unsharded = any(weight.requires_grad for weight in model.parameters())
    model.eval()
    for module in unsharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in unsharded:
            module.set_reshard_after_forward(
                not keeps_unsharded or id(module) != id(model), recurse=False
            )
        reshard(model)
        for submodule, training in zip(model.modules(), modes, strict=True):
            submodule.training = training

"""FSDP2: shard a network, reduce its gradients, and gather its weights for a rollout."""

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
    """Settings of the split of networks over the ranks.

    Args:
        param_dtype: Dtype in which the weights of blocks are gathered. None: the dtype of the
            weights.
        reduce_dtype: Dtype in which gradients are summed over the ranks. None: the dtype of the
            gradients.
        cpu_offload: Keep the shards in host memory.
        activation_checkpointing: Keep only the inputs of blocks and recompute the rest.
        gather_for_generation: Gather all weights before a rollout. None means to estimate if they
            fit.
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
    """State of a network's sharding. The defaults describe a network that is not sharded.

    Args:
        weight_files: Files of weights that have no values yet. None if all weights are loaded.
        gather_for_generation: True gathers the unsharded weights for a rollout. None means that
            `decide_gather` has to estimate if they fit.
        sync_every_microbatch: True averages gradients over the ranks after each micro-batch, False
            only after the last.
        unsharded_size: Bytes of the gathered weights.
    """

    weight_files: WeightFiles | None = None
    gather_for_generation: bool | None = True
    sync_every_microbatch: bool = False
    unsharded_size: int = 0

    def decide_gather(self, model: nn.Module, name: str) -> bool:
        """Return True if a rollout gathers the unsharded weights. An estimate is made once.

        Args:
            model: Network that this state belongs to.
            name: Name of the network, for the warning.
        """
        if self.gather_for_generation is None:
            self.gather_for_generation = unsharded_weights_fit(model, self.unsharded_size)
            if not self.gather_for_generation:
                rank_zero_warn(
                    f"The gathered weights of {name} ({self.unsharded_size / 2**30:.1f} GiB) would "
                    f"take more than half of the free memory, so responses are generated from "
                    f"shards. This is several times slower: each token gathers every block, and "
                    f"all ranks wait for the longest response. Set "
                    f"--trainer.strategy.gather_for_generation true to gather the weights."
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

    Returns:
        State of the sharding.
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
    # Inputs are not cast: autocast does it per operator, and keeps the residual stream in fp32.
    block_policy = MixedPrecisionPolicy(
        config.param_dtype, config.reduce_dtype, cast_forward_inputs=False
    )
    # Embedding, last norm and heads are gathered in their own dtype: autocast has fp32 logits, too.
    root_policy = MixedPrecisionPolicy(None, config.reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=data_mesh, mp_policy=block_policy, offload_policy=offload)
    # A trained network keeps its embedding and heads gathered until the end of the backward pass,
    # which needs them at once. Without a backward pass nothing would reshard them.
    keeps_unsharded = any(weight.requires_grad for weight in model.parameters())
    fully_shard(
        model,
        mesh=data_mesh,
        reshard_after_forward=not keeps_unsharded,
        mp_policy=root_policy,
        offload_policy=offload,
    )
    return state


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that are gathered one at a time. The list is empty without sharding.

    Args:
        model: Network, sharded or not.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights, so that only the shards are registered as parameters.

    Args:
        model: Network, sharded or not.
    """
    # FSDP2 reshards the root at the end of backward, so a forward pass alone leaves it gathered.
    for module in fsdp_modules(model):
        module.reshard()


def set_gradient_sync(model: nn.Module, state: ShardState, last: bool) -> None:
    """Choose if the next backward pass averages gradients over the ranks or only accumulates them.

    Args:
        model: Network; nothing is set if it is not sharded.
        state: State of the network's sharding.
        last: True for the last micro-batch of an optimizer step.
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

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
        >>> unsharded_size(layers, [layers[0]], torch.bfloat16)  # 8 numbers of 2 bytes, 6 of 4
        40
    """
    in_blocks = {weight for block in blocks for weight in block.parameters()}
    return sum(
        weight.numel()
        * (param_dtype if param_dtype and weight in in_blocks else weight.dtype).itemsize
        for weight in model.parameters()
    )


def free_memory(device: torch.device) -> int:
    """Return the bytes that this rank can still allocate.

    On a CPU this is an equal part of the machine's free memory.

    Args:
        device: Device of this rank.
    """
    if device.type == "cuda":
        # The driver counts torch's cached blocks as used, but torch reuses them.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return (
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.get_world_size()
    )


def unsharded_weights_fit(model: nn.Module, unsharded_size: int) -> bool:
    """Return True if the gathered weights fit in half of the memory that training leaves.

    All ranks return the same, and all must call it.

    Args:
        model: Sharded network.
        unsharded_size: Bytes of the gathered weights.
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    device = torch.device(weights[0].device_mesh.device_type)
    left = memory_headroom(model, unsharded_size, free_memory(device))
    # If ranks decided differently they would hang, because gathering is a collective.
    headroom = torch.tensor(left, dtype=torch.float64, device=device)
    distributed.all_reduce(headroom, op=distributed.ReduceOp.MIN)
    return bool(headroom >= 0)


def memory_headroom(model: nn.Module, unsharded_size: int, free: int) -> float:
    """Return half of the memory that training leaves, minus the gathered weights, in bytes.

    The other half is for the KV cache and activations.

    Args:
        model: Sharded network.
        unsharded_size: Bytes of the gathered weights.
        free: Bytes that this rank may still allocate.

    Example:
        >>> memory_headroom(nn.Linear(2, 2), unsharded_size=24, free=100)  # no shards: 100 / 2 - 24
        26.0
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    local = [weight.to_local() for weight in weights if weight.requires_grad]
    # Gradients and AdamW's two moments may not exist yet: three times the trained shards.
    return (free - 3 * sum(weight.nbytes for weight in local)) / 2 - unsharded_size


def all_reduce_and(condition: bool) -> bool:
    """Return True if the condition is true on every rank. All ranks must call it.

    Args:
        condition: Condition on this rank.
    """
    return not all_reduce_max(not condition)


def all_reduce_max(number: int) -> int:
    """Return the largest number of all ranks. All ranks must call it.

    Args:
        number: Number on this rank.
    """
    accelerator = torch.accelerator.current_accelerator()
    numbers = torch.tensor(int(number), device=accelerator or "cpu")
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)


@contextmanager
def gather_weights(model: nn.Module, is_gathered: bool) -> Iterator[None]:
    """Keep a network in eval mode and, if `is_gathered`, its unsharded weights in memory.

    With gathered weights, a generated token needs no collective.

    Args:
        model: Network, sharded or not.
        is_gathered: Gather the weights.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with gather_weights(layer, is_gathered=False):
        ...     layer.training
        False
    """
    modes = [module.training for module in model.modules()]
    unsharded = fsdp_modules(model) if is_gathered else []
    keeps_unsharded = any(weight.requires_grad for weight in model.parameters())
    model.eval()  # no dropout in sampled responses
    for module in unsharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        # Restore the root's setting from `shard`. Blocks reshard after each pass.
        for module in unsharded:
            module.set_reshard_after_forward(
                not keeps_unsharded or id(module) != id(model), recurse=False
            )
        reshard(model)
        for submodule, training in zip(model.modules(), modes, strict=True):
            submodule.training = training

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


class Sharding(NamedTuple):
    """How networks are split over ranks.

    Args:
        compute: Type that a block's weights are gathered in, where it is not their own. Embedding,
            last norm and heads always are gathered as they are: under autocast the unsharded
            residual stream and logits are fp32, too.
        reduce: Type in which gradients are summed over ranks, where it is not their own.
        offload: Shards sleep in host memory.
        checkpointing: Blocks keep their inputs alone.
        gather: Whether whole weights are gathered to generate; None asks an estimate.
        sum_once: Gradients are summed at the last micro-batch; until then each rank's are whole.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    offload: bool = False
    checkpointing: bool = False
    gather: bool | None = None
    sum_once: bool = True


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
            self.gather_for_generation = fits(model, self.unsharded_size)
            if not self.gather_for_generation:
                rank_zero_warn(
                    f"Whole weights of {name} ({self.unsharded_size / 2**30:.1f} GiB) would take "
                    f"more than half of the free memory: answers are generated from shards. Each "
                    f"token then gathers every block, and all ranks go on until the longest answer "
                    f"of any has ended: several times slower. `gather: true` of FSDP2 gathers all "
                    f"the same."
                )
        return self.gather_for_generation


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, how: Sharding
) -> ShardState:
    """Split the weights over the ranks of a mesh, block by block.

    Args:
        model: Network, built and not yet sharded.
        blocks: Its transformer blocks.
        mesh: Lightning's mesh with a tensor-parallel size of 1, or a mesh of replicas x shards.
        how: Settings of the split.
    """
    state = ShardState(
        gather_for_generation=how.gather,
        sync_every_microbatch=not how.sum_once,
        unsharded_size=whole_size(model, blocks, how.compute),
    )
    names = mesh.mesh_dim_names or ()
    line = mesh["data_parallel"] if "data_parallel" in names else mesh
    offload = (
        CPUOffloadPolicy(pin_memory=line.device_type != "cpu") if how.offload else OffloadPolicy()
    )
    compute = MixedPrecisionPolicy(how.compute, how.reduce, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(None, how.reduce, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=line, mp_policy=compute, offload_policy=offload)
    # what trains keeps its embedding and heads for the backward pass, which ends in resharding
    keeps = any(weight.requires_grad for weight in model.parameters())
    fully_shard(
        model,
        mesh=line,
        reshard_after_forward=not keeps,
        mp_policy=root,
        offload_policy=offload,
    )
    return state


def shards(model: nn.Module) -> list[FSDPModule]:
    """The parts of `model` that are gathered one at a time; none if it is whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Leaves shards alone registered: after a pass without backward the root still is whole."""
    for module in shards(model):
        module.reshard()


def synchronise(model: nn.Module, state: ShardState, last: bool) -> None:
    """Set whether the next backward averages gradients over the ranks, or only adds them up here.

    Args:
        model: Network; nothing is set if it is not sharded.
        state: Shard state of the network.
        last: Whether no micro-batch follows.
    """
    for module in shards(model):
        module.set_requires_gradient_sync(last or state.sync_every_microbatch, recurse=False)


def whole_size(model: nn.Module, blocks: Iterable[nn.Module], compute: torch.dtype | None) -> int:
    """Return the bytes of the gathered weights.

    Args:
        model: Network, not yet sharded.
        blocks: Its transformer blocks.
        compute: Dtype of the gathered blocks. None means their own.
    """
    in_blocks = {weight for block in blocks for weight in block.parameters()}
    return sum(
        weight.numel() * (compute if compute and weight in in_blocks else weight.dtype).itemsize
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


def fits(model: nn.Module, unsharded_size: int) -> bool:
    """Return whether gathered weights take at most half of the memory that training leaves.

    This holds on every rank or on none.

    Args:
        model: Sharded network.
        unsharded_size: Bytes of the gathered weights.
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    device = torch.device(weights[0].device_mesh.device_type)
    left = room_for(model, unsharded_size, free_memory(device))
    room = torch.tensor(left, dtype=torch.float64, device=device)
    distributed.all_reduce(room, op=distributed.ReduceOp.MIN)
    return bool(room >= 0)


def room_for(model: nn.Module, unsharded_size: int, free: int) -> float:
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


def on_all_ranks(fact: bool) -> bool:
    """Whether something is so on every rank; each of them has to ask."""
    return not largest(not fact)


def largest(number: int) -> int:
    """A number where it is largest of all ranks; each of them has to ask."""
    accelerator = torch.accelerator.current_accelerator()
    numbers = torch.tensor(int(number), device=accelerator or "cpu")
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)


@contextmanager
def gathered(model: nn.Module, is_gathered: bool) -> Iterator[None]:
    """Keep a network in eval mode and, if asked, its unsharded weights in memory.

    A generated token then costs no collective.

    Args:
        model: Network, sharded or not.
        is_gathered: Whether to gather the weights.
    """
    modes = [module.training for module in model.modules()]
    parts = shards(model) if is_gathered else []
    keeps = any(weight.requires_grad for weight in model.parameters())
    model.eval()
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(not keeps or id(module) != id(model), recurse=False)
        reshard(model)
        for part, training in zip(model.modules(), modes, strict=True):
            part.training = training

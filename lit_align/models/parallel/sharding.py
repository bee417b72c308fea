"""FSDP2 in three verbs: shard a model once, synchronise its gradients, gather it to generate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

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

from lit_align.models.backbone import Backbone
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.weights.sharded_loading import fill

Model = TypeVar("Model", bound=Backbone)


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


def shard(model: Model, mesh: DeviceMesh | None, how: Sharding | None = None) -> Model:
    """Splits the weights over the ranks of `mesh`, block by block; None leaves them whole.

    Args:
        model: Built, not yet sharded.
        mesh: Lightning's, of which tensor parallelism is 1; or of copies x shares.
        how: By default plainly.
    """
    if mesh is None:
        return model
    how = how or Sharding()
    model.gathers, model.gathered_size = how.gather, whole_size(model, how.compute)
    model.sums_once = how.sum_once
    names = mesh.mesh_dim_names or ()
    line = mesh["data_parallel"] if "data_parallel" in names else mesh
    offload = (
        CPUOffloadPolicy(pin_memory=line.device_type != "cpu") if how.offload else OffloadPolicy()
    )
    blocks = MixedPrecisionPolicy(how.compute, how.reduce, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(None, how.reduce, cast_forward_inputs=False)
    if how.checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
        if model.compiles:
            compile_blocks(model.blocks, recomputed=True)
    for block in model.blocks:
        fully_shard(block, mesh=line, mp_policy=blocks, offload_policy=offload)
    # what trains keeps its embedding and heads for the backward pass, which ends in resharding
    keeps = any(weight.requires_grad for weight in model.parameters())
    fully_shard(
        model,
        mesh=line,
        reshard_after_forward=not keeps,
        mp_policy=root,
        offload_policy=offload,
    )
    if model.files is not None:
        kind = "cpu" if how.offload else line.device_type  # the current one, as for fully_shard
        fill(model.network, model.files, torch.device(kind))
        model.files = None
    return model


def shards(model: nn.Module) -> list[FSDPModule]:
    """The parts of `model` that are gathered one at a time; none if it is whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Leaves shards alone registered: after a pass without backward the root still is whole."""
    for module in shards(model):
        module.reshard()


def synchronise(model: Backbone, last: bool) -> None:
    """Whether the next backward averages gradients over the ranks, or only adds them up here.

    Args:
        model: Sharded, or whole, where nothing is to be said.
        last: Whether no micro-batch follows.
    """
    for module in shards(model):
        module.set_requires_gradient_sync(last or not model.sums_once, recurse=False)


def whole_size(model: Backbone, compute: torch.dtype | None) -> int:
    """Bytes of gathered weights.

    Args:
        model: Not yet sharded.
        compute: Type of gathered blocks, where it is not their own.
    """
    blocks = {weight for block in model.blocks for weight in block.parameters()}
    return sum(
        weight.numel() * (compute if compute and weight in blocks else weight.dtype).itemsize
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


def fits(model: Backbone) -> bool:
    """Whether whole weights take at most half of the memory that training leaves, on every rank."""
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    device = torch.device(weights[0].device_mesh.device_type)
    room = torch.tensor(room_for(model, free_memory(device)), dtype=torch.float64, device=device)
    distributed.all_reduce(room, op=distributed.ReduceOp.MIN)
    return bool(room >= 0)


def room_for(model: Backbone, free: int) -> float:
    """Bytes that half of the memory which training leaves has beyond whole weights.

    Gradients and AdamW's moments, three times the trained shards, may still be to come; the other
    half is for keys, values and activations.

    Args:
        model: Sharded.
        free: Bytes that this rank may still take.
    """
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    local = [weight.to_local() for weight in weights if weight.requires_grad]
    return (free - 3 * sum(weight.nbytes for weight in local)) / 2 - model.gathered_size


def on_all_ranks(fact: bool) -> bool:
    """Whether something is so on every rank; each of them has to ask."""
    return not largest(not fact)


def largest(number: int) -> int:
    """A number where it is largest of all ranks; each of them has to ask."""
    accelerator = torch.accelerator.current_accelerator()
    numbers = torch.tensor(int(number), device=accelerator or "cpu")
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)


def decide(model: Backbone) -> bool:
    """Whether to gather whole weights: as told, or by an estimate at the first time, kept since."""
    if model.gathers is None:
        model.gathers = fits(model)
        if not model.gathers:
            rank_zero_warn(
                f"Whole weights of {model.name} ({model.gathered_size / 2**30:.1f} GiB) would take "
                f"more than half of the free memory: answers are generated from shards. Each token "
                f"then gathers every block, and all ranks go on until the longest answer of any "
                f"has ended: several times slower. `gather: true` of FSDP2 gathers all the same."
            )
    return model.gathers


@contextmanager
def gathered(model: Model) -> Iterator[Model]:
    """Whole weights if they fit, eval mode: a generated token then costs no collective."""
    split, modes = shards(model), [module.training for module in model.modules()]
    parts = split if split and decide(model) else []
    keeps = any(weight.requires_grad for weight in model.parameters())
    model.eval()
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in parts:
            module.set_reshard_after_forward(not keeps or id(module) != id(model), recurse=False)
        reshard(model)
        for part, training in zip(model.modules(), modes, strict=True):
            part.training = training

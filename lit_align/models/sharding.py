"""FSDP2 in two verbs: shard a model once, gather it while it generates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lit_align.models.backbone import Backbone

Model = TypeVar("Model", bound=Backbone)


def shard(model: Model, mesh: DeviceMesh | None) -> Model:
    """Splits the weights over the ranks of `mesh`, block by block; None leaves them whole."""
    if mesh is not None:
        parts: list[nn.Module] = [*model.blocks, model]
        for module in parts:
            fully_shard(module, mesh=mesh["data_parallel"])
    return model


def shards(model: nn.Module) -> list[FSDPModule]:
    """The parts of `model` that are gathered one at a time; none if it is whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward averages gradients over the ranks, or only adds them up here."""
    for module in shards(model):
        module.set_requires_gradient_sync(wanted, recurse=False)


@contextmanager
def gathered(model: Model) -> Iterator[Model]:
    """Whole weights, eval mode: a generated token then costs no collective."""
    parts, modes, root = shards(model), [m.training for m in model.modules()], id(model)
    model.eval()
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in parts:
            module.set_reshard_after_forward(id(module) != root, recurse=False)
            module.reshard()
        for part, training in zip(model.modules(), modes, strict=True):
            part.training = training

"""Whether saved weights are exactly those that a module expects, before any is loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Shapes = Mapping[str, torch.Size]  # by the weights' names


def shapes(weights: Mapping[str, Tensor]) -> Shapes:
    """Those of weights at hand; of sharded ones, the whole's."""
    return {name: weight.shape for name, weight in weights.items()}


def shapes_in(folder: Path) -> Shapes:
    """Those of a sharded checkpoint, by its index.

    Args:
        folder: Of the checkpoint.
    """
    start, index = "state_dict.", FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(start): entry.size
        for name, entry in index.items()
        if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
    }


def check_fit(module: nn.Module, found: Shapes) -> None:
    """Refuses weights that are not exactly those of `module.state_dict()`.

    Args:
        module: Is to get them.
        found: What there is.
    """
    expected = shapes(module.state_dict())
    names = {*expected, *found}
    strange = sorted(name for name in names if expected.get(name) != found.get(name))
    if strange:
        raise ValueError(
            f"The checkpoint does not fit this model: {len(strange)} weights are unknown, "
            f"missing or of another shape, such as '{strange[0]}'."
        )

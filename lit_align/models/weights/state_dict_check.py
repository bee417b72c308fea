"""Whether saved weights are exactly those that a module expects, before any is loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_align.errors import UserError

WeightShapes = Mapping[str, torch.Size]  # by the weights' names


def weight_shapes(weights: Mapping[str, Tensor]) -> WeightShapes:
    """Those of weights at hand; of sharded ones, the whole's."""
    return {name: weight.shape for name, weight in weights.items()}


def checkpoint_shapes(folder: Path) -> WeightShapes:
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


def check_state_dict(module: nn.Module, found: WeightShapes) -> None:
    """Refuses weights that are not exactly those of `module.state_dict()`.

    Args:
        module: Is to get them.
        found: What there is.
    """
    expected = weight_shapes(module.state_dict())
    names = {*expected, *found}
    mismatched = sorted(name for name in names if expected.get(name) != found.get(name))
    if mismatched:
        raise UserError(
            f"The checkpoint does not fit this model: {len(mismatched)} weights are unknown, "
            f"missing or of another shape, such as '{mismatched[0]}'."
        )

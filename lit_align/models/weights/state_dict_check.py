"""Check that saved weights match a module, before any of them is loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_align.errors import UserError

WeightShapes = Mapping[str, torch.Size]  # by name


def weight_shapes(weights: Mapping[str, Tensor]) -> WeightShapes:
    """Return the shapes of weights by name. Those of sharded weights are the unsharded shapes.

    Args:
        weights: Weights by name.

    Example:
        >>> weight_shapes(nn.Linear(3, 2).state_dict())
        {'weight': torch.Size([2, 3]), 'bias': torch.Size([2])}
    """
    return {name: weight.shape for name, weight in weights.items()}


def checkpoint_shapes(folder: Path) -> WeightShapes:
    """Return the shapes of a sharded checkpoint's weights by name, from its index.

    Args:
        folder: Folder of the checkpoint.
    """
    start, index = "state_dict.", FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(start): entry.size
        for name, entry in index.items()
        if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
    }


def check_state_dict(module: nn.Module, found: WeightShapes) -> None:
    """Raise a `UserError` if names or shapes differ from `module.state_dict()`.

    Args:
        module: Module that is to load the weights.
        found: Shapes of the saved weights by name.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> check_state_dict(layer, weight_shapes(layer.state_dict()))  # equal: no error
    """
    expected = weight_shapes(module.state_dict())
    names = {*expected, *found}
    mismatched = sorted(name for name in names if expected.get(name) != found.get(name))
    if mismatched:
        raise UserError(
            f"The checkpoint does not fit this model: {len(mismatched)} weights are unknown, "
            f"missing or of another shape, such as '{mismatched[0]}'. "
            f"Use the config of the run that saved it."
        )

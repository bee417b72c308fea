"""Reading and writing of unsharded checkpoints, also from a sharded one."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_align.runs.atomic_io import atomic_file
from lit_align.runs.checkpoint_files import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically and reads sharded checkpoints as unsharded ones.

    Writing needs no copy in memory. Reading accepts tensors and numbers, but no other objects.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint to one file.

        Args:
            checkpoint: Content of the file.
            path: File to write. Its folder is made if it is missing.
            storage_options: Unused.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return the content of a file, or of a sharded checkpoint as one file would hold it.

        Args:
            path: File, or folder of a sharded checkpoint.
            map_location: Unused: tensors are on the CPU.
            weights_only: Unused: always true.
        """
        found: dict[str, Any] = read_checkpoint(Path(path))
        if Path(path).is_dir():
            found |= load_unsharded(Path(path))
        return found


def load_unsharded(path: Path, prefix: str = "") -> dict[str, Any]:
    """Return the unsharded tensors of a sharded checkpoint in the structure of a single file.

    Args:
        path: Folder of the checkpoint.
        prefix: Start of the tensor names that are read, such as `state_dict.`. Default: all.
    """
    index = FileSystemReader(path).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():  # torch warns that this is one process
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(flat, checkpoint_id=path, no_dist=True)
    # planner_data has the keys of the nested dictionaries by flat name (torch 2.13)
    tree: dict[Any, Any] = {}
    for name, value in flat.items():
        key, *branches = reversed(index.planner_data[name])
        branch = tree
        for step in reversed(branches):
            branch = branch.setdefault(step, {})
        branch[key] = value
    # Lightning 2.6 names the states `optimizer_0`, ...; a single file has them in one list
    optimizers = [tree.pop(name) for name in sorted(tree) if name.startswith("optimizer_")]
    groups = [{**state, "param_groups": as_lists(state["param_groups"])} for state in optimizers]
    return {**tree, **({"optimizer_states": groups} if groups else {})}


def load_trained_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the unsharded weights of a checkpoint by name, without optimizer states.

    Args:
        path: File, or folder of a sharded checkpoint.
    """
    found = load_unsharded(path, "state_dict.") if path.is_dir() else read_checkpoint(path)
    weights: dict[str, torch.Tensor] = found["state_dict"]
    return weights


def as_lists(entries: Any) -> Any:
    """Return nested dictionaries with lists in the place of those whose keys are 0, 1, ....

    Example:
        >>> as_lists({"betas": {0: 0.5, 1: 0.75}})
        {'betas': [0.5, 0.75]}
    """
    if not isinstance(entries, dict):
        return entries
    values = {key: as_lists(value) for key, value in entries.items()}
    counted = list(values) == list(range(len(values)))
    return [values[number] for number in range(len(values))] if counted else values

"""How checkpoints are read and written where nothing is sharded, even if it was before."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_align.runs.checkpoint_files import partial_path, publish, read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes without a copy in memory, whole or not at all; reads tensors and numbers alone."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes under another name first."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = partial_path(target)
        torch.save(checkpoint, part)
        publish(part, target)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """A file's content, or that of a sharded checkpoint's folder put together."""
        found: dict[str, Any] = read_checkpoint(Path(path))
        if Path(path).is_dir():
            found |= load_unsharded(Path(path))
        return found


def load_unsharded(path: Path, prefix: str = "") -> dict[str, Any]:
    """The whole tensors of a sharded checkpoint, as one of a single file names them.

    Args:
        path: Its folder.
        prefix: What names of tensors must begin with, such as `state_dict`.
    """
    index = FileSystemReader(path).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():  # torch says that this is one process
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(flat, checkpoint_id=path, no_dist=True)
    tree: dict[Any, Any] = {}
    for name, value in flat.items():
        key, *branches = reversed(index.planner_data[name])
        branch = tree
        for step in reversed(branches):
            branch = branch.setdefault(step, {})
        branch[key] = value
    optimizers = [tree.pop(name) for name in sorted(tree) if name.startswith("optimizer_")]
    groups = [{**state, "param_groups": as_lists(state["param_groups"])} for state in optimizers]
    return {**tree, **({"optimizer_states": groups} if groups else {})}


def load_trained_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, whole, and nothing of the optimizer.

    Args:
        path: Its file or folder.
    """
    found = load_unsharded(path, "state_dict.") if path.is_dir() else read_checkpoint(path)
    weights: dict[str, torch.Tensor] = found["state_dict"]
    return weights


def as_lists(entries: Any) -> Any:
    """Lists where the index counts from 0 on.

    Args:
        entries: Nested dictionaries.
    """
    if not isinstance(entries, dict):
        return entries
    values = {key: as_lists(value) for key, value in entries.items()}
    counted = list(values) == list(range(len(values)))
    return [values[number] for number in range(len(values))] if counted else values

"""Checkpoint files of a run: names, lookup, headers and deletion."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.errors import UserError
from lit_align.runs.atomic_io import delete_path, write_text_atomic

CHECKPOINT_FOLDER, SUPERSEDED = "checkpoints", "superseded"
CHECKPOINT_NAME = re.compile(r"iteration_(\d+)\.ckpt")
METADATA_FILE = "meta.pt"  # what is not a tensor in a sharded checkpoint, by lightning 2.6.6
READ_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


def checkpoint_folder(root: str | Path) -> Path:
    """Return the folder of a run's checkpoints.

    Args:
        root: Run folder.
    """
    return Path(root) / CHECKPOINT_FOLDER


def checkpoint_name(iteration: int) -> str:
    """Return the name of an iteration's file or folder.

    Example:
        >>> checkpoint_name(12)
        'iteration_000012.ckpt'
    """
    return f"iteration_{iteration:06d}.ckpt"


def parse_iteration(path: Path) -> int:
    """Return the iteration in a checkpoint's name.

    Example:
        >>> parse_iteration(Path("checkpoints/iteration_000012.ckpt"))
        12
    """
    found = CHECKPOINT_NAME.fullmatch(path.name)
    if found is None:
        raise UserError(f"{path} is not named after an iteration, such as {checkpoint_name(12)}.")
    return int(found.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, from the oldest to the newest."""
    found = [path for path in folder.glob("*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=parse_iteration)


def delete_partial_files(folder: Path) -> None:
    """Delete the incomplete files and folders of a killed save."""
    for part in folder.glob(".*.part"):
        delete_path(part)


def is_write_error(error: BaseException) -> bool:
    """Return True if a file could not be written, by Python or by torch.

    Example:
        >>> is_write_error(OSError(28, "No space left on device"))
        True
    """
    if isinstance(error, CheckpointException):  # of a sharded checkpoint, with the errors by rank
        return any(is_write_error(cause) for cause, _ in error.failures.values())
    # torch 2.13 raises a RuntimeError that names its own file or class
    archive = re.search("inline_container|PytorchStreamWriter", str(error))
    return isinstance(error, OSError) or archive is not None


def move_to_superseded(paths: list[Path], folder: Path) -> None:
    """Move checkpoints of another run to `superseded/`, so that `last` ignores them.

    Args:
        paths: Checkpoints in `folder`.
        folder: Folder of the run's checkpoints.
    """
    superseded = folder / SUPERSEDED
    for path in paths:
        superseded.mkdir(exist_ok=True)
        delete_path(superseded / path.name)
        path.rename(superseded / path.name)


def write_best(folder: Path, path: Path) -> None:
    """Write the name of the best checkpoint to the file `best`."""
    write_text_atomic(folder / "best", f"{path.name}\n")


def read_best(folder: Path) -> Path | None:
    """Return the best checkpoint, or None if it does not exist."""
    marker = folder / "best"
    path = folder / marker.read_text().strip() if marker.is_file() else None
    return path if path is not None and path.exists() else None


def newest_readable(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that can be read, and a sentence for each newer one that cannot.

    Raises:
        UserError: If that checkpoint is of version 0.1.
    """
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        try:
            header = read_complete_header(path)
        except ValueError as error:
            complaints.append(str(error))
        else:
            # an older one would not help: all checkpoints before it are of version 0.1, too
            check_version(path, header)
            return path, complaints
    return None, complaints


def read_header(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without its tensors in memory.

    The tensors of a single file are mapped from the disk. Those of a sharded checkpoint are left
    out.

    Args:
        path: File, or folder of a sharded checkpoint.

    Raises:
        UserError: If it is truncated, of another program, or of version 0.1.
    """
    found = read_complete_header(path)
    check_version(path, found)
    return found


def check_version(path: Path, header: dict[str, Any]) -> None:
    """Refuse a checkpoint of version 0.1, which did not write its version.

    Example:
        >>> check_version(Path("a.ckpt"), {"lit_align_version": "0.2.0"})
    """
    if "lit_align_version" not in header:
        raise UserError(
            f"{path} was written by lit_align 0.1, whose names were changed. Train again, or "
            "export it with version 0.1."
        )


def read_complete_header(path: Path) -> dict[str, Any]:
    """Return the header of a complete checkpoint of any version.

    Raises:
        UserError: If it is truncated or of another program.
    """
    try:
        found = read_checkpoint(path)
        truncated = list(truncated_files(path)) if path.is_dir() else []
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read: it is truncated or not a checkpoint ({reason[:120]})."
        ) from error
    if truncated:
        raise UserError(f"{path} cannot be read: {truncated[0]} is truncated.")
    if not isinstance(found, dict) or not {"algorithm", "iteration", "loops"} <= found.keys():
        raise UserError(f"{path} is not a checkpoint of a lit_align run.")
    return found


def read_checkpoint(path: Path) -> Any:
    """Return a file's content with its tensors on the disk, or a sharded checkpoint's metadata."""
    # weights_only: a pickle could otherwise run code
    if path.is_dir():
        return torch.load(path / METADATA_FILE, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def truncated_files(path: Path) -> Iterator[str]:
    """Yield the files of a sharded checkpoint that are shorter than its index says.

    Args:
        path: Folder of the checkpoint.
    """
    ends: dict[str, int] = {}
    for entry in FileSystemReader(path).read_metadata().storage_data.values():
        ends[entry.relative_path] = max(
            ends.get(entry.relative_path, 0), entry.offset + entry.length
        )
    for name, end in ends.items():
        file = path / name
        if not file.is_file() or file.stat().st_size < end:
            yield name

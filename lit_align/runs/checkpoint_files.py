"""Checkpoints on disk: each appears whole or not at all, and is looked at before it is loaded."""

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.errors import UserError

CHECKPOINT_FOLDER, SUPERSEDED = "checkpoints", "superseded"
CHECKPOINT_NAME = re.compile(r"iteration_(\d+)\.ckpt")
METADATA_FILE = "meta.pt"  # Lightning's name of what is no tensor in a sharded checkpoint's folder
READ_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


def checkpoint_folder(root: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(root) / CHECKPOINT_FOLDER


def checkpoint_name(iteration: int) -> str:
    """The file or folder of an iteration."""
    return f"iteration_{iteration:06d}.ckpt"


def parse_iteration(path: Path) -> int:
    """The iteration in a checkpoint's name."""
    found = CHECKPOINT_NAME.fullmatch(path.name)
    if found is None:
        raise UserError(f"{path} is not named after an iteration.")
    return int(found.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, from the oldest to the newest."""
    found = [path for path in folder.glob("*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=parse_iteration)


def partial_path(path: Path) -> Path:
    """The name under which a checkpoint is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def publish(part: Path, path: Path) -> None:
    """Gives a checkpoint its name once all of it is on the disk.

    Args:
        part: What has been written.
        path: Its name from now on; what was there before gives way.
    """
    for file in [*part.rglob("*"), part]:
        fsync_path(file)
    if path.is_dir():  # a rename replaces a file, not a folder
        old = partial_path(path.with_name(f"{path.name}.old"))
        path.rename(old)
        part.rename(path)
        delete_checkpoint(old)
    else:
        part.replace(path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Waits until a file or a folder's list of files is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, of one file or sharded."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_partial_files(folder: Path) -> None:
    """Deletes what a killed save left behind."""
    for part in folder.glob(".*.part"):
        delete_checkpoint(part)


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written; torch says that of its own archives in its own words."""
    if isinstance(error, CheckpointException):  # of sharded checkpoints, by rank
        return any(is_write_error(cause) for cause, _ in error.failures.values())
    archive = re.search("inline_container|PytorchStreamWriter", str(error))
    return isinstance(error, OSError) or archive is not None


def move_to_superseded(paths: list[Path], folder: Path) -> None:
    """Moves checkpoints of another course of the run out of the way of `last`.

    Args:
        paths: Of `folder`.
        folder: The run's.
    """
    superseded = folder / SUPERSEDED
    for path in paths:
        superseded.mkdir(exist_ok=True)
        delete_checkpoint(superseded / path.name)
        path.rename(superseded / path.name)


def write_best(folder: Path, path: Path) -> None:
    """Notes which checkpoint is the best, in a file of one line."""
    marker = folder / ".best.part"
    marker.write_text(f"{path.name}\n")
    publish(marker, folder / "best")


def read_best(folder: Path) -> Path | None:
    """The checkpoint noted as the best, if it is there."""
    marker = folder / "best"
    path = folder / marker.read_text().strip() if marker.is_file() else None
    return path if path is not None and path.exists() else None


def newest_readable(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and a sentence for each newer one that cannot."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        try:
            read_header(path)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def read_header(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside a sharded one's tensors; those of one file stay on the disk.

    Raises:
        ValueError: In a sentence, if it is truncated or none of ours.
    """
    try:
        found = read_checkpoint(path)
        lost = list(truncated_files(path)) if path.is_dir() else []
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read: it was cut short, or it is no checkpoint ({reason[:120]})."
        ) from error
    if lost:
        raise UserError(f"{path} cannot be read: {lost[0]} was cut short.")
    if not isinstance(found, dict) or not {"algorithm", "iteration", "loops"} <= found.keys():
        raise UserError(f"{path} is not a checkpoint of a lit_align run.")
    return found


def read_checkpoint(path: Path) -> Any:
    """A file's content with its tensors left on the disk; of a sharded checkpoint, the head."""
    if path.is_dir():
        return torch.load(path / METADATA_FILE, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def truncated_files(path: Path) -> Iterator[str]:
    """Names of a sharded checkpoint's files that are shorter than its index says."""
    ends: dict[str, int] = {}
    for entry in FileSystemReader(path).read_metadata().storage_data.values():
        ends[entry.relative_path] = max(
            ends.get(entry.relative_path, 0), entry.offset + entry.length
        )
    for name, end in ends.items():
        file = path / name
        if not file.is_file() or file.stat().st_size < end:
            yield name

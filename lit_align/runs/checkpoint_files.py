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

FOLDER, SUPERSEDED = "checkpoints", "superseded"
NAME = re.compile(r"iteration_(\d+)\.ckpt")
META = "meta.pt"  # Lightning's name of what is no tensor in a sharded checkpoint's folder
BROKEN = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


def folder_of(root: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(root) / FOLDER


def name_of(iteration: int) -> str:
    """The file or folder of an iteration."""
    return f"iteration_{iteration:06d}.ckpt"


def iteration_of(path: Path) -> int:
    """The iteration in a checkpoint's name."""
    found = NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path} is not named after an iteration.")
    return int(found.group(1))


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, from the oldest to the newest."""
    found = [path for path in folder.glob("*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(found, key=iteration_of)


def part_of(path: Path) -> Path:
    """The name under which a checkpoint is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def publish(part: Path, path: Path) -> None:
    """Gives a checkpoint its name once all of it is on the disk.

    Args:
        part: What has been written.
        path: Its name from now on; what was there before gives way.
    """
    for file in [*part.rglob("*"), part]:
        sync(file)
    if path.is_dir():  # a rename replaces a file, not a folder
        old = part_of(path.with_name(f"{path.name}.old"))
        path.rename(old)
        part.rename(path)
        remove(old)
    else:
        part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of files is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def remove(path: Path) -> None:
    """Deletes a checkpoint, of one file or sharded."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Deletes what a killed save left behind."""
    for part in folder.glob(".*.part"):
        remove(part)


def unwritten(error: BaseException) -> bool:
    """Whether a file could not be written; torch says that of its own archives in its own words."""
    if isinstance(error, CheckpointException):  # of sharded checkpoints, by rank
        return any(unwritten(cause) for cause, _ in error.failures.values())
    archive = re.search("inline_container|PytorchStreamWriter", str(error))
    return isinstance(error, OSError) or archive is not None


def set_aside(paths: list[Path], folder: Path) -> None:
    """Moves checkpoints of another course of the run out of the way of `last`.

    Args:
        paths: Of `folder`.
        folder: The run's.
    """
    place = folder / SUPERSEDED
    for path in paths:
        place.mkdir(exist_ok=True)
        remove(place / path.name)
        path.rename(place / path.name)


def write_best(folder: Path, path: Path) -> None:
    """Notes which checkpoint is the best, in a file of one line."""
    note = folder / ".best.part"
    note.write_text(f"{path.name}\n")
    publish(note, folder / "best")


def read_best(folder: Path) -> Path | None:
    """The checkpoint noted as the best, if it is there."""
    note = folder / "best"
    path = folder / note.read_text().strip() if note.is_file() else None
    return path if path is not None and path.exists() else None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and a sentence for each newer one that cannot."""
    complaints = []
    for path in reversed(saved(folder)):
        try:
            head(path)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def head(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside a sharded one's tensors; those of one file stay on the disk.

    Raises:
        ValueError: In a sentence, if it is truncated or none of ours.
    """
    try:
        found = read(path)
        lost = list(truncated(path)) if path.is_dir() else []
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read: it was cut short, or it is no checkpoint ({reason[:120]})."
        ) from error
    if lost:
        raise ValueError(f"{path} cannot be read: {lost[0]} was cut short.")
    if not isinstance(found, dict) or not {"algorithm", "iteration", "loops"} <= found.keys():
        raise ValueError(f"{path} is not a checkpoint of a lit_align run.")
    return found


def read(path: Path) -> Any:
    """A file's content with its tensors left on the disk; of a sharded checkpoint, the head."""
    if path.is_dir():
        return torch.load(path / META, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def truncated(path: Path) -> Iterator[str]:
    """Names of a sharded checkpoint's files that are shorter than its index says."""
    ends: dict[str, int] = {}
    for place in FileSystemReader(path).read_metadata().storage_data.values():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
    for name, end in ends.items():
        file = path / name
        if not file.is_file() or file.stat().st_size < end:
            yield name

"""Atomic writes: write under a temporary name, then rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return the hidden name of a file or folder while it is written.

    Example:
        >>> partial_path(Path("run/metrics.csv")).name
        '.metrics.csv.part'
    """
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a partial path to write to, and publish it as `path` when the block succeeds.

    An OSError deletes the partial file, and `path` stays as it was.

    Args:
        path: File to write. Its folder must exist.
    """
    part = partial_path(path)
    try:
        yield part
        publish(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 file that is complete or not there at all.

    Args:
        path: File to write. Its folder must exist.
        text: Content of the file.
    """
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def publish(part: Path, path: Path) -> None:
    """Rename a written file or folder to `path`, after all of it is on the disk.

    Args:
        part: File or folder that is complete.
        path: New name. A file or folder of that name is replaced.
    """
    for file in [*part.rglob("*"), part]:
        fsync_path(file)
    if path.is_dir():  # a rename can replace a file, but not a folder with content
        old = partial_path(path.with_name(f"{path.name}.old"))
        path.rename(old)
        part.rename(path)
        delete_path(old)
    else:
        part.replace(path)
    fsync_path(path.parent)  # the parent folder stores the new name


def fsync_path(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def delete_path(path: Path) -> None:
    """Delete a file or a folder with its content. A missing one is ignored if it was a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder, and move its content into `target` when the block succeeds.

    Files and folders of the same name are replaced. If the block fails, `target` stays as it was.

    Args:
        target: Folder that gets the content.
    """
    part = partial_path(target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        target.mkdir(parents=True, exist_ok=True)
        for found in part.iterdir():
            if found.is_dir():
                shutil.rmtree(target / found.name, ignore_errors=True)
            found.replace(target / found.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)

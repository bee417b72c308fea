"""Sentences for errors of libraries that a user can correct, and a filter for known warnings."""

import errno
import logging
import os
import re
import warnings
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_align.errors import UserError

MAX_LENGTH = 300  # characters of a library's message that are printed


def library_message(error: BaseException) -> str | None:
    """Return the sentence for an error of a library that a user can correct, else None.

    These are: memory or disk that ran out, settings that Lightning refuses, and a `UserError` that
    a library has wrapped.

    Args:
        error: Exception that the command raised.
    """
    if (wrapped := wrapped_user_error(error)) is not None:
        return str(wrapped)
    if isinstance(error, torch.OutOfMemoryError):
        return str(error)
    if isinstance(error, MisconfigurationException):
        return one_line(str(error))
    if is_disk_full(error):
        named = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return (
            f"There is no space left on the disk{named}. Free some, or write to another disk with "
            f"--trainer.default_root_dir. Earlier checkpoints are complete: --ckpt_path last "
            f"resumes from them."
        )
    return None


def wrapped_user_error(error: BaseException | None) -> UserError | None:
    """Return the `UserError` that caused `error`, if there is one.

    jsonargparse raises a ValueError of its own from an error in a constructor.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__ if type(error) is ValueError else None
    return error


def one_line(text: str) -> str:
    r"""Return a library's message on one line, cut after 300 characters.

    Example:
        >>> one_line("No such\n    file")
        'No such file'
    """
    line = " ".join(text.split())
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}..."


def is_disk_full(error: BaseException) -> bool:
    """Return True if a disk, a quota or the largest size of a file is used up."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)  # safetensors 0.5 to 0.8


def run_folder_message(error: OSError, folder: Path) -> str | None:
    """Return the sentence for a run folder that cannot be written, else None.

    Args:
        error: What a run raised.
        folder: `trainer.default_root_dir`.
    """
    if not isinstance(error.filename, str | os.PathLike) or is_disk_full(error):
        return None
    failed, folder = Path(error.filename).absolute(), folder.absolute()
    if failed != folder and folder not in failed.parents and failed not in folder.parents:
        return None
    return (
        f"{error.filename}: {error.strerror}. Set --trainer.default_root_dir to a folder that can "
        f"be written."
    )


def silence_known_warnings() -> None:
    """Silence messages that libraries print at every start and that no user can act on."""
    chatter = re.compile(r"💡|GPU available: False|TPU available|to estimate number of stepping")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not chatter.search(record.getMessage()))
    warnings.filterwarnings("ignore", r"'set_vital' is deprecated", UserWarning)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints that it starts
    for text in (
        r"It is recommended to use `self\.log\(.*sync_dist",  # means are over all ranks already
        "treespec",
        "Found .* module.*in eval mode",
        ".* does not have many workers",
    ):
        warnings.filterwarnings("ignore", f".*{text}")

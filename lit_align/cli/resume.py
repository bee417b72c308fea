"""Find the checkpoint of `--ckpt_path`."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from lit_align.errors import UserError
from lit_align.runs.checkpoint_files import (
    checkpoint_folder,
    newest_readable,
    read_best,
    read_header,
)


def resolve_checkpoint(config: Namespace, fitting: bool) -> str | None:
    """Return the checkpoint of `--ckpt_path`; `last` and `best` are looked up in the run folder.

    Args:
        config: Settings of the command.
        fitting: True for `fit`, where `last` may not exist yet.
    """
    ckpt_path, folder = config.get("ckpt_path"), checkpoint_folder(config.trainer.default_root_dir)
    if ckpt_path is None:
        return None
    if ckpt_path == "hpc" or (
        ckpt_path in ("last", "best") and "ModelCheckpoint" in str(config.trainer.callbacks)
    ):
        return str(ckpt_path)  # for Lightning to look up
    if ckpt_path not in ("last", "best"):
        if not Path(ckpt_path).exists():
            raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint.")
        read_header(Path(ckpt_path))
        return str(ckpt_path)
    path, messages = (read_best(folder), []) if ckpt_path == "best" else newest_readable(folder)
    for message in messages:
        rank_zero_only(print)(f"{message} Using the one before it.")
    if path is None and not (fitting and ckpt_path == "last"):
        raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint in {folder}.")
    if path is None:
        rank_zero_only(print)(
            f"--ckpt_path last: no checkpoint in {folder} yet; the run starts from the beginning"
        )
        return None
    iteration = read_header(path)["iteration"]
    verb = "resuming from" if fitting else "loading"
    rank_zero_only(print)(f"--ckpt_path {ckpt_path}: {verb} {path}, iteration {iteration}")
    return str(path)

"""What a run was made with: command, versions, machine, and the state of the user's code."""

import json
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.core.base import Algorithm
from lit_align.runs.atomic_io import write_text_atomic
from lit_align.runs.environment_file import (
    ENVIRONMENT_FILE,
    PATCH_FILE,
    environment_entry,
    git_state,
    read_starts,
)

MAX_PATCH_BYTES = 2_000_000  # bytes of a patch that is kept


class EnvironmentLog(Callback):
    """Writes `environment.json` when a fit starts: a list with an entry per start of this run.

    If the folder that the command was given in is a git repository, an entry names its commit,
    branch and changed files, and `uncommitted.patch` holds what the commit lacks.

    Args:
        command: The words behind `lit-align`; empty where a script started the run.
    """

    def __init__(self, command: tuple[str, ...] = ()):
        self.command = command

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Adds this start to those that the run goes on from; the first rank writes."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        git, patch = git_state(Path.cwd())
        before = read_starts(folder) if trainer.ckpt_path else []
        (folder / PATCH_FILE).unlink(missing_ok=True)
        if patch:
            (folder / PATCH_FILE).write_bytes(patch[:MAX_PATCH_BYTES])
        entry = {**environment_entry(trainer, self.command), "git": git}
        write_text_atomic(folder / ENVIRONMENT_FILE, json.dumps([*before, entry], indent=1) + "\n")

"""Log of the command, versions, machine and git state of each start of a run."""

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

MAX_PATCH_BYTES = 2_000_000  # a longer patch is cut


class EnvironmentLog(Callback):
    """Write `environment.json` when a fit starts: a list with one entry per start of the run.

    In a git repository, an entry has the commit, branch and changed files of the current folder.
    `uncommitted.patch` has the changes since the commit.

    Args:
        command: Arguments after `lit-align`. Default: none, for a Python script.
    """

    def __init__(self, command: tuple[str, ...] = ()):
        self.command = command

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Add an entry for this start, on the first rank. A new run removes earlier entries."""
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

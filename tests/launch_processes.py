"""Runs of several processes as users start them: by the command line or by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

FEW = [
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--data.batch_size", "4", "--data.max_rows", "32", "--trainer.accelerator", "cpu"),
]


def lit_align(folder: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a short run of `lit-align fit`, with stdout and stderr in one pipe.

    Args:
        folder: Working folder. The run writes to its subfolder `run`.
        words: Options of the command line.
        before: Options of Python before the module. Default: none.
    """
    line = [sys.executable, *before, "-m", "lit_align.cli.main", "fit", *words, *FEW]
    removed = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    return subprocess.Popen(
        [*line, "--trainer.default_root_dir", str(folder / "run")],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], seconds: int) -> tuple[int, str]:
    """Return the exit status and all output. Kill a run that hangs, and raise."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, text

"""Starts runs of several processes as users do: by the command line, or by torchrun per node."""

import os
import subprocess
import sys
from pathlib import Path

FEW = [
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--data.batch_size", "4", "--data.max_rows", "32", "--trainer.accelerator", "cpu"),
]


def lit_align(folder: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A short run of `lit-align fit`; its output is one text.

    Args:
        folder: It runs there, and writes to `run` in it.
        words: Of its command line.
        before: What python is asked to run it.
    """
    line = [sys.executable, *before, "-m", "lit_align.cli.main", "fit", *words, *FEW]
    kept = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(kept)}
    return subprocess.Popen(
        [*line, "--trainer.default_root_dir", str(folder / "run")],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: int) -> tuple[int, str]:
    """The exit status and all that was printed; a run that hangs is killed and an error."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, text

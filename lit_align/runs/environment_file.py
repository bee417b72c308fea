"""Content of `environment.json`: command, versions, machine and git state of each start."""

import json
import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lit_align.errors import UserError
from lit_align.version import __version__

ENVIRONMENT_FILE, PATCH_FILE = "environment.json", "uncommitted.patch"
RECORDED_PACKAGES = (
    *("torch", "lightning", "transformers", "tokenizers", "safetensors", "peft", "accelerate"),
    *("datasets", "torchdata", "torchao", "numpy"),
)

EnvironmentEntry = dict[str, object]


def read_starts(folder: Path) -> list[EnvironmentEntry]:
    """Return the entries of a run folder, from the first start on; empty without the file.

    Args:
        folder: Run folder.
    """
    file = folder / ENVIRONMENT_FILE
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Delete or restore it.") from error
    return [entry for entry in entries if isinstance(entry, dict)]


def environment_entry(trainer: Trainer, command: tuple[str, ...]) -> EnvironmentEntry:
    """Return the entry of this start: time, command, machine and versions.

    Args:
        trainer: Trainer of the run.
        command: Arguments after `lit-align`. Empty for a Python script.
    """
    device = trainer.strategy.root_device
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["lit-align", *command]) if command else "",
        "folder": str(Path.cwd()),
        "ranks": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"lit_align": __version__, **package_versions()},
    }


def package_versions() -> dict[str, str]:
    """Return the versions of installed packages that may change a result.

    Example:
        >>> "torch" in package_versions()
        True
    """
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> tuple[EnvironmentEntry | None, bytes]:
    """Return commit, branch and changed files of a folder, and the changes as a patch.

    Both are empty (None and b"") if git knows no commit of the folder.

    Args:
        folder: Any folder of the working tree.
    """
    commit = run_git(folder, "rev-parse", "HEAD")
    if not commit:
        return None, b""
    changed = run_git(folder, "status", "--porcelain", "--untracked-files=no").decode(
        "utf-8", "replace"
    )
    facts: EnvironmentEntry = {
        "commit": commit.decode().strip(),
        "branch": run_git(folder, "branch", "--show-current").decode("utf-8", "replace").strip(),
        "changed": [line[3:] for line in changed.splitlines()],
    }
    return facts, run_git(folder, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD")


def run_git(folder: Path, *arguments: str) -> bytes:
    """Return the output of git, or b"" without git, a repository or a commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "--no-optional-locks", *arguments],
            capture_output=True,
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""

"""`environment.json`: command, versions, machine and git state of each start of a run."""

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
    """The entries of a run folder, from the first start on; empty if none were kept.

    Args:
        folder: Of the run.
    """
    file = folder / ENVIRONMENT_FILE
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}. Delete it, or restore it.") from error
    return [entry for entry in entries if isinstance(entry, dict)]


def environment_entry(trainer: Trainer, command: tuple[str, ...]) -> EnvironmentEntry:
    """This start: when, by which command, on what, with which versions."""
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
    """Of what is installed and may change a result."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> tuple[EnvironmentEntry | None, bytes]:
    """The commit that a folder is at, and what it lacks as a patch; None where git knows none.

    Args:
        folder: Anywhere in the working tree.
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
    """What git prints; nothing where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "--no-optional-locks", *arguments],
            capture_output=True,
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""

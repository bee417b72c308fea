"""EnvironmentLog: command, versions and git state of each start."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from lit_align.callbacks.environment import EnvironmentLog, git_state, read_starts
from lit_align.version import __version__


def git(folder, *words: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path):
    """Return a repository with one commit."""
    folder = tmp_path / "tree"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "trunk")
    (folder / "my reward.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "x")
    return folder


def start(folder, command: str = "", ckpt_path: str | None = None) -> None:
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, default_root_dir=folder, ckpt_path=ckpt_path,
        world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    EnvironmentLog(tuple(command.split())).on_fit_start(trainer, None)


def test_resumed_run_has_one_entry_per_start(tmp_path):
    start(tmp_path, "fit --config remax")
    start(tmp_path, "fit --config remax --ckpt_path last", ckpt_path="x.ckpt")
    entries = read_starts(tmp_path)
    assert [entry["command"] for entry in entries] == [
        "lit-align fit --config remax",
        "lit-align fit --config remax --ckpt_path last",
    ]
    assert entries[0]["versions"]["lit_align"] == __version__
    assert entries[0]["versions"]["torch"] == torch.__version__
    assert entries[0]["device"] == "cpu"
    start(tmp_path, "fit --config sft")
    assert [entry["command"] for entry in read_starts(tmp_path)] == ["lit-align fit --config sft"]


def test_arguments_with_spaces_are_quoted(tmp_path):
    arguments = ("fit", "--data.path", "my data.jsonl")
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, default_root_dir=tmp_path, ckpt_path=None,
        world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    EnvironmentLog(arguments).on_fit_start(trainer, None)
    assert read_starts(tmp_path)[0]["command"] == "lit-align fit --data.path 'my data.jsonl'"


def test_commit_and_patch_are_recorded(tree, tmp_path, monkeypatch):
    facts, patch = git_state(tree)
    commit = git(tree, "rev-parse", "HEAD")
    assert facts == {"commit": commit, "branch": "trunk", "changed": []}
    assert patch == b""
    (tree / "my reward.py").write_text("a = 2\n")
    monkeypatch.chdir(tree)
    start(tmp_path / "run")
    assert read_starts(tmp_path / "run")[0]["git"]["changed"] == ['"my reward.py"']
    kept = tmp_path / "run" / "uncommitted.patch"
    git(tree, "checkout", "--quiet", ".")
    git(tree, "apply", str(kept))
    assert (tree / "my reward.py").read_text() == "a = 2\n"
    git(tree, "checkout", "--quiet", ".")
    start(tmp_path / "run")
    assert not kept.exists()


def test_folder_without_repository_has_no_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, b"")
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, b"")


def test_invalid_environment_file_is_named(tmp_path):
    assert read_starts(tmp_path) == []
    (tmp_path / "environment.json").write_text("[{")
    with pytest.raises(ValueError, match=r"environment.json is not JSON .* Delete or restore it"):
        read_starts(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps([{"command": "a"}, 3]))
    assert read_starts(tmp_path) == [{"command": "a"}]

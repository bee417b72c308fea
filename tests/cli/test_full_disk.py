"""A full disk, simulated by a limit on file sizes: one message and no incomplete file."""

import os
import resource
from pathlib import Path

import pytest
from run_cli import run

from lit_align.cli.main import main
from lit_align.runs.atomic_io import atomic_folder, write_text_atomic
from lit_align.runs.checkpoint_files import list_checkpoints, newest_readable

RUN = [
    *("fit", "--config", "remax", "--config", "toy", "--data.batch_size", "4"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0"),
]


def run_with_file_limit(num_bytes: int, argv: list[str], folder: Path) -> tuple[int, list[str]]:
    """Run a command whose files may not exceed `num_bytes`; return status and messages."""

    def set_limit() -> None:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    reader, writer = os.pipe()  # a log file would reach the limit too
    (status,) = run(argv, Path(f"/dev/fd/{writer}"), before=set_limit)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert "Traceback" not in text, text
    assert status is not None
    return status, [line for line in text.splitlines() if "lit-align:" in line]


def unfinished_files(folder: Path) -> set[str]:
    """Return names of files that may be incomplete."""
    parts = {path.name for path in folder.rglob("*") if path.name.endswith(".part")}
    return parts | {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("num_bytes", "more", "text"),
    [
        (1_000, (), "There is no space left on the disk"),
        (60_000, (), "iteration_000002.ckpt could not be written; "),
        (300_000, ("--trainer.enable_checkpointing", "false"), "no space left on the disk"),
    ],
    ids=["config", "checkpoint", "export"],
)
def test_a_run_on_a_full_disk_ends_with_one_message(num_bytes, more, text, tmp_path):
    status, messages = run_with_file_limit(num_bytes, [*RUN, *more], tmp_path)
    assert status == 2
    assert text in messages[0]
    assert len(messages) == 1
    assert not unfinished_files(tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert all(path.stat().st_size for path in tmp_path.rglob("config.yaml"))


def test_a_run_resumes_from_the_checkpoint_before_the_disk_was_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(RUN) == 0
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    status, messages = run_with_file_limit(60_000, [*RUN, *more], tmp_path)
    assert status == 2
    assert "Last checkpoint: " in messages[0]
    assert "iteration_000002.ckpt. Free disk space" in messages[0]
    folder = tmp_path / "runs" / "remax" / "checkpoints"
    path, unreadable = newest_readable(folder)
    assert list_checkpoints(folder) == [path]
    assert not unreadable
    assert main([*RUN, *more]) == 0
    assert newest_readable(folder)[0].name == "iteration_000004.ckpt"


def fail_halfway(folder: Path) -> None:
    with atomic_folder(folder) as part:
        (part / "a").write_text("half")
        raise OSError("full")


def test_a_folder_is_replaced_only_when_it_is_complete(tmp_path):
    folder = tmp_path / "hf"
    for text in ("old", "new"):
        with atomic_folder(folder) as part:
            (part / "a").write_text(text)
            (part / "adapter").mkdir()
            (part / "adapter" / "b").write_text(text)
    assert [(folder / name).read_text() for name in ("a", "adapter/b")] == ["new", "new"]
    with pytest.raises(OSError, match="full"):
        fail_halfway(folder)
    assert (folder / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "x", "old")

    def fail(self, other):
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text_atomic(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"

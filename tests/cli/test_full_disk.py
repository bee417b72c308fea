"""A disk that is full: a sentence, and nothing half-written. Files may grow to a limit alone."""

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


def full_at(num_bytes: int, argv: list[str], folder: Path) -> tuple[int, list[str]]:
    """Status and what is said where no file may be larger."""

    def fill() -> None:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    reader, writer = os.pipe()  # a file of what is said would be full, too
    (status,) = run(argv, Path(f"/dev/fd/{writer}"), before=fill)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert "Traceback" not in text, text
    assert status is not None
    return status, [line for line in text.splitlines() if "lit-align:" in line]


def left(folder: Path) -> set[str]:
    """Names of what might be half a file."""
    parts = {path.name for path in folder.rglob("*") if path.name.endswith(".part")}
    return parts | {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("num_bytes", "more", "text"),
    [
        (1_000, (), "There is no room left on the disk"),
        (60_000, (), "iteration_000002.ckpt could not be written; "),
        (300_000, ("--trainer.enable_checkpointing", "false"), "no room left on the disk"),
    ],
    ids=["config", "checkpoint", "export"],
)
def test_a_run_ends_in_a_sentence(num_bytes, more, text, tmp_path):
    status, said = full_at(num_bytes, [*RUN, *more], tmp_path)
    assert status == 2
    assert text in said[0]
    assert len(said) == 1
    assert not left(tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert all(path.stat().st_size for path in tmp_path.rglob("config.yaml"))


def test_the_checkpoint_before_stays_whole_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(RUN) == 0
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    status, said = full_at(60_000, [*RUN, *more], tmp_path)
    assert status == 2
    assert "Last checkpoint: " in said[0]
    assert "iteration_000002.ckpt. Free disk space" in said[0]
    folder = tmp_path / "runs" / "remax" / "checkpoints"
    path, complaints = newest_readable(folder)
    assert list_checkpoints(folder) == [path]
    assert not complaints
    assert main([*RUN, *more]) == 0
    assert newest_readable(folder)[0].name == "iteration_000004.ckpt"


def write_half(place: Path) -> None:
    with atomic_folder(place) as part:
        (part / "a").write_text("half")
        raise OSError("full")


def test_a_folder_is_replaced_when_all_of_it_is_written(tmp_path):
    place = tmp_path / "hf"
    for text in ("old", "new"):
        with atomic_folder(place) as part:
            (part / "a").write_text(text)
            (part / "adapter").mkdir()
            (part / "adapter" / "b").write_text(text)
    assert [(place / name).read_text() for name in ("a", "adapter/b")] == ["new", "new"]
    with pytest.raises(OSError, match="full"):
        write_half(place)
    assert (place / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "x", "old")

    def fail(self, other):
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text_atomic(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"

"""Checkpoints of version 0.1: refused in one sentence by fit, export and the lookup of `last`."""

from pathlib import Path

import pytest
import torch
from tiny_models import RandomPrompts, tiny, trainer
from torch.distributed import checkpoint as dcp

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.cli.main import main
from lit_align.errors import UserError
from lit_align.runs.checkpoint_files import (
    METADATA_FILE,
    list_checkpoints,
    newest_readable,
    read_header,
)
from lit_align.version import __version__

OLD = {"algorithm": "SFT", "iteration": 2, "loops": {}}
SENTENCE = (
    "{} was written by lit_align 0.1, whose names were changed. Train again, or export it with "
    "version 0.1."
)


@pytest.fixture
def old_file(tmp_path) -> Path:
    """Return a checkpoint of one file with the header of version 0.1, in a run folder."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({**OLD, "state_dict": {}}, folder / "iteration_000002.ckpt")
    return folder / "iteration_000002.ckpt"


@pytest.fixture
def old_folder(tmp_path) -> Path:
    """Return a sharded checkpoint with the header of version 0.1."""
    folder = tmp_path / "sharded" / "iteration_000002.ckpt"
    dcp.save({"state_dict.weight": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    torch.save(OLD, folder / METADATA_FILE)
    return folder


@pytest.mark.parametrize("kind", ["old_file", "old_folder"])
def test_header_without_version_is_refused(kind, request):
    path = request.getfixturevalue(kind)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert str(error.value) == SENTENCE.format(path)


def test_lookup_of_last_does_not_skip_old_checkpoints(old_file):
    with pytest.raises(UserError, match=r"was written by lit_align 0\.1,"):
        newest_readable(old_file.parent)


@pytest.mark.parametrize("kind", ["old_file", "old_folder"])
def test_fit_refuses_path_of_old_checkpoint(kind, request, tmp_path, monkeypatch, capsys):
    path = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "sft", "--config", "toy", "--ckpt_path", str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lit-align: {SENTENCE.format(path)}"


def test_fit_refuses_last_in_old_run_folder(old_file, monkeypatch, capsys):
    monkeypatch.chdir(old_file.parent)
    run = str(old_file.parents[1])
    argv = ["fit", "--config", "sft", "--config", "toy", "--trainer.default_root_dir", run]
    assert main([*argv, "--ckpt_path", "last"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lit-align: {SENTENCE.format(old_file)}"
    assert old_file.exists()


@pytest.mark.parametrize("kind", ["old_file", "old_folder"])
def test_export_refuses_old_checkpoint(kind, request, tmp_path, capsys):
    path = request.getfixturevalue(kind)
    assert main(["export", "--ckpt_path", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lit-align: {SENTENCE.format(path)}"


def test_export_refuses_old_run_folder(old_file, tmp_path, capsys):
    run = str(old_file.parents[1])
    assert main(["export", "--ckpt_path", run, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lit-align: {SENTENCE.format(old_file)}"


def test_new_checkpoints_have_the_version(tmp_path):
    run = trainer(
        tmp_path, callbacks=[Checkpoints()], enable_checkpointing=True, limit_val_batches=0
    )
    run.fit(ReMax(policy=tiny), RandomPrompts(1))
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    assert read_header(path)["lit_align_version"] == __version__

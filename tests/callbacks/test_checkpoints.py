"""Checkpoints: when they are written, which are kept, and incomplete saves."""

import signal
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import RandomPrompts, tiny, trainer
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.errors import UserError
from lit_align.runs import checkpoint_files as files
from lit_align.runs.atomic_io import delete_path, publish
from lit_align.runs.stop_signals import StopSignals


class Scores(Callback):
    """Callback that logs a given value in each validation."""

    def __init__(self, *values: float):
        self.values = list(values)

    def on_validation_epoch_end(self, trainer, module):
        module.log("val/score", self.values.pop(0))


def fit(folder, checkpoints, num_batches=6, callbacks=(), **settings):
    settings = {"limit_val_batches": 0, "enable_checkpointing": True, **settings}
    torch.manual_seed(0)
    run = trainer(folder, callbacks=[checkpoints, *callbacks], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(ReMax(policy=tiny), RandomPrompts(num_batches))
    return [
        files.parse_iteration(path)
        for path in files.list_checkpoints(files.checkpoint_folder(folder))
    ]


@pytest.mark.parametrize(
    ("every", "keep", "kept"),
    [(0, 2, [7]), (2, 1, [7]), (2, 2, [6, 7]), (2, 9, [2, 4, 6, 7]), (7, 9, [7]), (50, 2, [7])],
)
def test_saves_every_n_iterations_and_at_the_end(tmp_path, every, keep, kept):
    assert fit(tmp_path, Checkpoints(every, keep), num_batches=7) == kept


def test_iterations_are_not_optimizer_steps(tmp_path):
    run = trainer(
        tmp_path, callbacks=[Checkpoints(1, 9)], enable_checkpointing=True, limit_val_batches=0
    )
    run.fit(GRPO(policy=tiny, num_samples=2, update_epochs=2), RandomPrompts(3))
    assert run.global_step == 6
    found = files.list_checkpoints(files.checkpoint_folder(tmp_path))
    assert [files.parse_iteration(path) for path in found] == [1, 2, 3]


@pytest.mark.parametrize(("mode", "best"), [("max", 4), ("min", 2)])
def test_best_checkpoint_is_kept(tmp_path, mode, best):
    values = Scores(
        0.5, 0.1, 0.9, 0.3, 0.4
    )  # in the sanity check, then at iterations 2, 4, 6 and 8
    kept = fit(
        tmp_path,
        Checkpoints(0, 1, "val/score", mode),
        num_batches=8,
        callbacks=[values],
        limit_val_batches=1,
        val_check_interval=2,
    )
    assert kept == [best, 8]
    found = files.read_best(files.checkpoint_folder(tmp_path))
    assert found is not None
    assert files.parse_iteration(found) == best


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("val/scor", r"a logged metric, found val/scor\. Set it to one of .*val/score"),
        ("val/objective/kl", r"^val/objective/kl was renamed to val/kl/per_response_k1\. Set mon"),
        ("objective/entropy", r"^objective/entropy is no longer logged\. Set monitor of Checkp"),
    ],
)
def test_unknown_monitor_is_refused(tmp_path, monitor, message):
    with pytest.raises(UserError, match=message):
        fit(
            tmp_path,
            Checkpoints(monitor=monitor),
            callbacks=[Scores(0.0, 1.0)],
            limit_val_batches=1,
        )


def test_incomplete_saves_are_deleted(tmp_path):
    folder = files.checkpoint_folder(tmp_path)
    (folder / ".iteration_000003.ckpt.part").mkdir(parents=True)
    (folder / ".iteration_000003.ckpt.part" / "__0_0.distcp").write_text("half")
    (folder / ".iteration_000005.ckpt.part").write_text("half")
    assert files.newest_readable(folder) == (None, [])
    assert fit(tmp_path, Checkpoints()) == [6]
    assert not list(folder.glob(".*"))


def test_checkpoint_of_same_iteration_is_replaced(tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("")):
        old, part = tmp_path / "iteration_000001.ckpt", tmp_path / ".iteration_000001.ckpt.part"
        make(old)
        part.mkdir() if old.is_dir() else part.write_text("")
        (part / "new").write_text("x") if part.is_dir() else part.write_text("new")
        publish(part, old)
        assert (old / "new").exists() if old.is_dir() else old.read_text() == "new"
        delete_path(old)
        assert not list(tmp_path.iterdir())


def test_fast_dev_run_saves_nothing(tmp_path):
    assert fit(tmp_path, Checkpoints(1), fast_dev_run=2) == []


def test_invalid_checkpoint_settings_are_refused():
    with pytest.raises(ValueError, match="keep_last >= 1, found 5 and 0"):
        Checkpoints(5, 0)


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    signals = StopSignals()
    signals.install()
    signal.raise_signal(signal.SIGUSR1)
    assert signals.received is signal.SIGUSR1
    signals.restore()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, "requeue 12\n"), (signal.SIGTERM, "")]
)
def test_slurm_job_is_requeued_after_its_warning(tmp_path, monkeypatch, number, requeued):
    calls = tmp_path / "calls"
    calls.write_text("")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    strategy = DDPStrategy(cluster_environment=SLURMEnvironment(requeue_signal=signal.SIGUSR1))
    signals = StopSignals()
    signals.received = number
    signals.requeue(SimpleNamespace(strategy=strategy, is_global_zero=True))
    assert calls.read_text() == requeued


@pytest.mark.parametrize(
    ("error", "is_write_error"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos 64"), True),
        (RuntimeError("shapes differ"), False),
        (CheckpointException("", {1: (OSError(28, "No space left on device"), None)}), True),
        (CheckpointException("", {0: (ValueError("Failed to validate global plan"), None)}), False),
    ],
)
def test_write_errors_are_recognized(error, is_write_error):
    assert files.is_write_error(error) is is_write_error

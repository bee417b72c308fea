"""Progress: the printed lines, and the bar of a terminal."""

import io
import re

import pytest
from lightning.pytorch import Callback
from rich.console import Console
from tiny_models import RandomPrompts, tiny, trainer

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks import progress
from lit_align.callbacks.progress import Progress, format_duration
from lit_align.callbacks.timing import Timing

NUMBER = r"-?[\d.]+(?:e[-+]\d+)?"


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


class StopAfter(Callback):
    """Callback that ends a run after a number of steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *hook):
        trainer.should_stop = trainer.global_step >= self.steps


def test_fit_prints_requested_number_of_lines(run, capsys):
    run(
        ReMax(policy=tiny),
        num_batches=20,
        limit_val_batches=0,
        callbacks=[Progress(lines_per_fit=4)],
    )
    lines = steps(capsys.readouterr().out)
    assert [line[:10] for line in lines] == ["step  5/20", "step 10/20", "step 15/20", "step 20/20"]
    shown = "  ".join(
        rf"{name} {NUMBER}" for name in ("loss", "reward", "kl/per_response_k1", "entropy", "lr")
    )
    for line in lines:
        assert re.fullmatch(rf"step [ \d]+/20  {shown}  \d+:\d\d left", line), line
        assert len(line) < 120


def test_last_step_and_one_validation_are_printed(run, capsys):
    run(ReMax(policy=tiny), num_batches=7, callbacks=[Progress(lines_per_fit=2)])
    out = capsys.readouterr().out
    assert [line[:8] for line in steps(out)] == ["step 3/7", "step 6/7", "step 7/7"]
    (validation,) = [line for line in out.splitlines() if "val/" in line]
    assert re.fullmatch(rf"(val/\S+ {NUMBER}(  |$))+", validation)
    assert "val/reward " in validation


def test_zero_lines_print_nothing(run, capsys):
    run(ReMax(policy=tiny), limit_val_batches=0, callbacks=[Progress(lines_per_fit=0)])
    assert steps(capsys.readouterr().out) == []


def test_run_without_end_prints_lines(run, capsys):
    run(
        ReMax(policy=tiny),
        num_batches=20,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[Progress(lines_per_fit=20), StopAfter(40)],
    )
    lines = steps(capsys.readouterr().out)
    assert len(lines) == 2
    assert re.fullmatch(rf"step 20  loss {NUMBER}  .*  lr {NUMBER}", lines[0])


def test_steps_before_resume_count(tmp_path, capsys):
    first = trainer(tmp_path, limit_val_batches=0)
    first.fit(ReMax(policy=tiny), RandomPrompts(2))
    first.save_checkpoint(tmp_path / "part.ckpt")
    second = trainer(tmp_path, limit_val_batches=0, max_epochs=2, callbacks=[Progress()])
    second.fit(ReMax(policy=tiny), RandomPrompts(2), ckpt_path=tmp_path / "part.ckpt")
    assert [line[:8] for line in steps(capsys.readouterr().out)] == ["step 3/4", "step 4/4"]


def test_measured_phases_and_speed_are_printed(tmp_path, capsys):
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[Progress(lines_per_fit=1)])
    run.callbacks.insert(0, Timing())
    run.fit(ReMax(policy=tiny), RandomPrompts(3))
    (line,) = steps(capsys.readouterr().out)
    shares = r"rollout \d+ % \| score \d+ % \| prepare \d+ % \| update \d+ %"
    assert re.search(rf"  [\d,]+ tokens/s  {shares}  0:00 left$", line), line
    assert 98 <= sum(map(int, re.findall(r"(\d+) %", line))) <= 102  # each is rounded


def test_bar_shows_progress_of_phase(monkeypatch):
    shown = Progress()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    shown.begin("rollout")
    assert shown.render_line().plain == "rollout"  # the first iteration has no estimate
    shown.seconds, shown.tail = {"rollout": 10.0, "score": 1.0, "update": 8.0}, "  1:00 left"
    monkeypatch.setattr(progress.time, "monotonic", lambda: 104.1)
    assert shown.render_line().plain == "rollout 41 % | score | update  1:00 left"
    monkeypatch.setattr(progress.time, "monotonic", lambda: 200.0)
    assert "rollout 99 % |" in shown.render_line().plain
    shown.end("rollout")
    assert shown.render_line().plain == "rollout | score | update  1:00 left"


def test_terminal_shows_bar_and_removes_it(tmp_path):
    screen = io.StringIO()
    shown = Progress(lines_per_fit=1)
    shown.console = Console(file=screen, force_terminal=True, width=150)
    remax = ReMax(policy=tiny)
    trainer(tmp_path, limit_val_batches=0, callbacks=[shown]).fit(remax, RandomPrompts(3))
    assert "━" in screen.getvalue()
    assert "step 3/3" in screen.getvalue()
    assert shown.live is None
    assert not remax.phase_listeners


def test_error_removes_bar(tmp_path):
    class Broken(ReMax):
        def losses(self, batch):
            raise RuntimeError("no loss")

    shown = Progress()
    shown.console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError, match="no loss"):
        trainer(tmp_path, callbacks=[shown]).fit(Broken(policy=tiny), RandomPrompts(1))
    assert shown.live is None


def test_format_duration():
    assert [format_duration(s) for s in (0.4, 61, 3599.6, 3723, -1)] == [
        "0:00", "1:01", "1:00:00", "1:02:03", "0:00",
    ]  # fmt: skip

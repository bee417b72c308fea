"""Progress: few lines, each of them readable."""

import io
import re

import pytest
from rich.console import Console
from tiny_models import RandomPrompts, tiny, trainer

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks import progress
from lit_align.callbacks.progress import Progress, format_duration
from lit_align.callbacks.timing import Timing

NUMBER = r"-?[\d.]+(?:e[-+]\d+)?"


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_a_fit_says_about_as_many_lines_as_it_is_asked_for(run, capsys):
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


def test_the_last_step_is_shown_and_the_validation_once(run, capsys):
    run(ReMax(policy=tiny), num_batches=7, callbacks=[Progress(lines_per_fit=2)])
    out = capsys.readouterr().out
    assert [line[:8] for line in steps(out)] == ["step 3/7", "step 6/7", "step 7/7"]
    (validation,) = [line for line in out.splitlines() if "val/" in line]
    assert re.fullmatch(rf"(val/\S+ {NUMBER}(  |$))+", validation)
    assert "val/reward " in validation


def test_no_lines_at_all_if_none_are_wanted(run, capsys):
    run(ReMax(policy=tiny), limit_val_batches=0, callbacks=[Progress(lines_per_fit=0)])
    assert steps(capsys.readouterr().out) == []


def test_a_run_without_an_end_has_lines_too(run, capsys):
    run(
        ReMax(policy=tiny),
        num_batches=20,
        max_epochs=-1,
        max_time={"seconds": 5},
        limit_val_batches=0,
        callbacks=[Progress(lines_per_fit=20)],
    )
    lines = steps(capsys.readouterr().out)
    assert re.fullmatch(rf"step 20  loss {NUMBER}  .*  lr {NUMBER}", lines[0])


def test_steps_of_an_earlier_part_of_the_run_count(tmp_path, capsys):
    first = trainer(tmp_path, limit_val_batches=0)
    first.fit(ReMax(policy=tiny), RandomPrompts(2))
    first.save_checkpoint(tmp_path / "part.ckpt")
    second = trainer(tmp_path, limit_val_batches=0, max_epochs=2, callbacks=[Progress()])
    second.fit(ReMax(policy=tiny), RandomPrompts(2), ckpt_path=tmp_path / "part.ckpt")
    assert [line[:8] for line in steps(capsys.readouterr().out)] == ["step 3/4", "step 4/4"]


def test_phases_and_speed_are_in_the_line_where_they_are_measured(tmp_path, capsys):
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[Progress(lines_per_fit=1)])
    run.callbacks.insert(0, Timing())
    run.fit(ReMax(policy=tiny), RandomPrompts(3))
    (line,) = steps(capsys.readouterr().out)
    shares = r"rollout \d+ % \| score \d+ % \| prepare \d+ % \| update \d+ %"
    assert re.search(rf"  [\d,]+ tokens/s  {shares}  0:00 left$", line), line
    assert 98 <= sum(map(int, re.findall(r"(\d+) %", line))) <= 102  # each is rounded


def test_the_bar_says_how_much_of_a_phase_is_over(monkeypatch):
    shown = Progress()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    shown.begin("rollout")
    assert shown.render_line().plain == "rollout"  # of the first iteration nothing is known
    shown.seconds, shown.tail = {"rollout": 10.0, "score": 1.0, "update": 8.0}, "  1:00 left"
    monkeypatch.setattr(progress.time, "monotonic", lambda: 104.1)
    assert shown.render_line().plain == "rollout 41 % | score | update  1:00 left"
    monkeypatch.setattr(progress.time, "monotonic", lambda: 200.0)
    assert "rollout 99 % |" in shown.render_line().plain
    shown.end("rollout")
    assert shown.render_line().plain == "rollout | score | update  1:00 left"


def test_on_a_terminal_there_is_a_bar_and_it_is_taken_away(tmp_path):
    screen = io.StringIO()
    shown = Progress(lines_per_fit=1)
    shown.console = Console(file=screen, force_terminal=True, width=150)
    remax = ReMax(policy=tiny)
    trainer(tmp_path, limit_val_batches=0, callbacks=[shown]).fit(remax, RandomPrompts(3))
    assert "━" in screen.getvalue()
    assert "step 3/3" in screen.getvalue()
    assert shown.live is None
    assert not remax.phase_listeners


def test_an_error_takes_the_bar_away(tmp_path):
    class Broken(ReMax):
        def losses(self, batch):
            raise RuntimeError("no loss")

    shown = Progress()
    shown.console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError, match="no loss"):
        trainer(tmp_path, callbacks=[shown]).fit(Broken(policy=tiny), RandomPrompts(1))
    assert shown.live is None


def test_a_clock():
    assert [format_duration(s) for s in (0.4, 61, 3599.6, 3723, -1)] == [
        "0:00", "1:01", "1:00:00", "1:02:03", "0:00",
    ]  # fmt: skip

"""Progress: few lines, each of them readable."""

import re

from harness import RandomPrompts, tiny, trainer

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.progress import Progress

NUMBER = r"-?[\d.]+(?:e[-+]\d+)?"


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_a_fit_says_about_as_many_lines_as_it_is_asked_for(run, capsys):
    run(ReMax(policy=tiny), num_batches=20, limit_val_batches=0, callbacks=[Progress(lines=4)])
    lines = steps(capsys.readouterr().out)
    assert [line[:10] for line in lines] == ["step  5/20", "step 10/20", "step 15/20", "step 20/20"]
    shown = rf"loss {NUMBER}  reward {NUMBER}  objective/kl {NUMBER}  entropy {NUMBER}  lr {NUMBER}"
    for line in lines:
        assert re.fullmatch(rf"step [ \d]+/20  {shown}  \d+ s left", line), line
        assert len(line) < 120


def test_the_last_step_is_shown_and_the_validation_once(run, capsys):
    run(ReMax(policy=tiny), num_batches=7, callbacks=[Progress(lines=2)])
    out = capsys.readouterr().out
    assert [line[:8] for line in steps(out)] == ["step 3/7", "step 6/7", "step 7/7"]
    (validation,) = [line for line in out.splitlines() if "val/" in line]
    assert re.fullmatch(rf"(val/\S+ {NUMBER}(  |$))+", validation)
    assert "val/reward " in validation


def test_no_lines_at_all_if_none_are_wanted(run, capsys):
    run(ReMax(policy=tiny), limit_val_batches=0, callbacks=[Progress(lines=0)])
    assert steps(capsys.readouterr().out) == []


def test_a_run_without_an_end_has_lines_too(run, capsys):
    run(
        ReMax(policy=tiny),
        num_batches=20,
        max_epochs=-1,
        max_time={"seconds": 5},
        limit_val_batches=0,
        callbacks=[Progress(lines=20)],
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

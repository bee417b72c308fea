"""SIGKILL at any moment, then `--ckpt_path last`: the run that was never killed."""

from pathlib import Path

import pytest
from killing_points import Moment, Moments, read, spread
from run_cli import TWO_RANKS, assert_same_run, checkpoint_argv, fit_argv, metrics, run, succeed

from lit_align.runs.checkpoint_files import list_checkpoints, newest_readable

PPO = ("--model.kl_target=0.1", "--model.kl_horizon=50", "--model.normalize_scores=true")
PHASES = ("save", "rollout", "update")


def whole_run(folder: Path, argv: list[str], ranks: int = 1) -> list[Moment]:
    """Runs undisturbed, and all of its moments."""
    log = folder / "moments"
    codes = run(argv, folder / "log", ranks, before=Moments(log).watch)
    assert codes == [0] * ranks, (folder / "log").read_text()
    return read(log)


def assert_survives(moment: Moment, whole: Path, argv: list[str], folder: Path, ranks: int) -> None:
    """Kills a run at a moment, resumes it, and compares it with the one that was not killed."""
    log = folder / "log"
    codes = run(argv, log, ranks, before=Moments(folder / "moments", moment.number).watch)
    assert codes[0] == -9, f"{moment}: {codes}, {log.read_text()}"
    assert read(folder / "moments")[-1] == moment
    there = list_checkpoints(folder / "run" / "checkpoints")
    assert newest_readable(folder / "run" / "checkpoints") == (there[-1] if there else None, [])
    succeed([*argv, "--ckpt_path=last"], log, ranks)
    assert_same_run(folder / "run", whole)
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def assert_all_survive(tmp_path: Path, chosen, *settings: str, ranks: int = 1) -> list[Moment]:
    """Kills at each of the moments that `chosen` takes of all; those moments."""
    whole = tmp_path / "whole"
    whole.mkdir()
    moments = whole_run(whole, fit_argv(whole / "run", *settings, *checkpoint_argv(2)), ranks)
    taken = chosen(moments)
    for moment in taken:
        folder = tmp_path / f"killed at {moment.number}"
        folder.mkdir()
        argv = fit_argv(folder / "run", *settings, *checkpoint_argv(2))
        assert_survives(moment, whole / "run", argv, folder, ranks)
    rows = [row["step"] for row in metrics(whole / "run") if "loss" in row]
    assert rows == [str(step) for step in range(8)]
    return taken


def in_phases(number: int, more: int = 0):
    """Chooses so many moments inside of each phase, and more of all phases."""

    def chosen(moments: list[Moment]) -> list[Moment]:
        inside = [m for p in PHASES for m in spread([m for m in moments if m.phase == p], number)]
        return sorted({*inside, *spread(moments, more)})

    return chosen


def test_three_kills(tmp_path):
    taken = assert_all_survive(tmp_path, in_phases(1), "remax")
    assert {moment.phase for moment in taken} == set(PHASES)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_kills_and_more(tmp_path):
    taken = assert_all_survive(tmp_path, in_phases(5, 9), "ppo", *PPO)
    assert len(taken) >= 20


@pytest.mark.long
@pytest.mark.timeout(900)
def test_five_kills_of_two_processes(tmp_path):
    taken = assert_all_survive(tmp_path, in_phases(1, 2), "remax", *TWO_RANKS, ranks=2)
    assert len(taken) == 5


@pytest.mark.long
def test_every_step_of_one_save(tmp_path):
    def steps(moments: list[Moment]) -> list[Moment]:
        return [m for m in moments if m.phase == "save" and m.iteration == 6]

    assert len(assert_all_survive(tmp_path, steps, "sft")) >= 8

"""A run that is killed at any point and resumed equals the run that was never killed."""

from pathlib import Path

import pytest
from killing_points import KillingPoint, KillingPoints, evenly_spaced, read
from run_cli import TWO_RANKS, assert_same_run, checkpoint_argv, fit_argv, metrics, run, succeed

from lit_align.runs.checkpoint_files import list_checkpoints, newest_readable

PPO = ("--model.kl_target=0.1", "--model.kl_horizon=50", "--model.normalize_scores=true")
PHASES = ("save", "rollout", "update")


def undisturbed_run(folder: Path, argv: list[str], ranks: int = 1) -> list[KillingPoint]:
    """Run without a kill and return all killing points."""
    log = folder / "points"
    codes = run(argv, folder / "log", ranks, before=KillingPoints(log).watch)
    assert codes == [0] * ranks, (folder / "log").read_text()
    return read(log)


def assert_resumes_after_kill(
    point: KillingPoint, undisturbed: Path, argv: list[str], folder: Path, ranks: int
) -> None:
    """Kill a run at a point, resume it and compare it with the run that was not killed."""
    log = folder / "log"
    codes = run(argv, log, ranks, before=KillingPoints(folder / "points", point.number).watch)
    assert codes[0] == -9, f"{point}: {codes}, {log.read_text()}"
    assert read(folder / "points")[-1] == point
    there = list_checkpoints(folder / "run" / "checkpoints")
    assert newest_readable(folder / "run" / "checkpoints") == (there[-1] if there else None, [])
    succeed([*argv, "--ckpt_path=last"], log, ranks)
    assert_same_run(folder / "run", undisturbed)
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def assert_resumes_after_kills(
    tmp_path: Path, chosen, *settings: str, ranks: int = 1
) -> list[KillingPoint]:
    """Kill at each of the points that `chosen` selects, and return these points."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    points = undisturbed_run(
        undisturbed, fit_argv(undisturbed / "run", *settings, *checkpoint_argv(2)), ranks
    )
    taken = chosen(points)
    for point in taken:
        folder = tmp_path / f"killed at {point.number}"
        folder.mkdir()
        argv = fit_argv(folder / "run", *settings, *checkpoint_argv(2))
        assert_resumes_after_kill(point, undisturbed / "run", argv, folder, ranks)
    rows = [row["step"] for row in metrics(undisturbed / "run") if "loss" in row]
    assert rows == [str(step) for step in range(8)]
    return taken


def in_phases(number: int, more: int = 0):
    """Return a choice of `number` points in each phase and `more` of all points."""

    def chosen(points: list[KillingPoint]) -> list[KillingPoint]:
        inside = [
            m for p in PHASES for m in evenly_spaced([m for m in points if m.phase == p], number)
        ]
        return sorted({*inside, *evenly_spaced(points, more)})

    return chosen


def test_a_kill_in_each_phase(tmp_path):
    taken = assert_resumes_after_kills(tmp_path, in_phases(1), "remax")
    assert {point.phase for point in taken} == set(PHASES)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_kills(tmp_path):
    taken = assert_resumes_after_kills(tmp_path, in_phases(5, 9), "ppo", *PPO)
    assert len(taken) >= 20


@pytest.mark.long
@pytest.mark.timeout(900)
def test_five_kills_of_two_ranks(tmp_path):
    taken = assert_resumes_after_kills(tmp_path, in_phases(1, 2), "remax", *TWO_RANKS, ranks=2)
    assert len(taken) == 5


@pytest.mark.long
def test_a_kill_at_each_step_of_a_save(tmp_path):
    def steps(points: list[KillingPoint]) -> list[KillingPoint]:
        return [m for m in points if m.phase == "save" and m.iteration == 6]

    assert len(assert_resumes_after_kills(tmp_path, steps, "sft")) >= 8

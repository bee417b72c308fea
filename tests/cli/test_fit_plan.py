"""`lit-align fit --plan`: a table before the fit, the differences after it, the same training."""

import csv

from run_cli import FSDP2, fit_argv, metrics, succeed

from lit_align.callbacks.foretold import GIB, PlanAccuracy
from lit_align.callbacks.memory import Memory, PhasePeak

PHASES = ["load", "rollout", "score", "prepare", "update"]
SHORT = ("--trainer.limit_train_batches=1", "--trainer.enable_checkpointing=false")


def columns(file, *names):
    with file.open() as lines:
        return [[row[name] for name in names] for row in csv.DictReader(lines)]


def test_a_fit_says_what_it_takes_and_how_far_that_was_off(tmp_path):
    plain, planned = tmp_path / "plain", tmp_path / "planned"
    succeed(fit_argv(plain, "remax", *SHORT, epochs=1), tmp_path / "log")
    said = succeed([*fit_argv(planned, "remax", *SHORT, epochs=1), "--plan"], tmp_path / "log")
    before, _, after = said.partition("step 1/1")
    assert "GiB of a device at the peak of each phase" in before
    assert "peak 0.0" in before
    rows = [line.split() for line in after.partition("memory, GiB")[2].splitlines()[1:]]
    assert [row[0] for row in rows[:5]] == PHASES
    assert all(row[3].endswith("%") for row in rows[:5])
    bytes_of = columns(planned / "memory.csv", "phase", "peak", "planned")
    assert [phase for phase, *_ in bytes_of] == PHASES
    for (_, found, planned_bytes), row in zip(bytes_of, rows[:5], strict=True):
        assert row[3] == f"{int(planned_bytes) / int(found) - 1:+.1%}"
    same = [
        {name: value for name, value in row.items() if not name.startswith("memory/")}
        for row in metrics(planned)
    ]
    assert same == metrics(plain)


def test_one_of_two_ranks_plans(tmp_path):
    """And both shard, save and train after it as ever."""
    folder = tmp_path / "run"
    given = fit_argv(folder, "sft", *FSDP2, "--trainer.limit_train_batches=2", epochs=1)
    said = succeed([*given, "--plan"], tmp_path / "log", 2)
    assert said.count("GiB of a device at the peak of each phase") == 1
    assert said.count("memory, GiB") == 1
    assert columns(folder / "memory.rank0.csv", "planned")
    header = (folder / "memory.rank1.csv").read_text().splitlines()[0]
    assert header == "phase,peak,parameters,gradients,optimizer_state,other"


def test_a_difference_is_a_share_of_what_was_measured():
    memory = Memory()
    memory.peaks = {
        "load": PhasePeak(2 * GIB, 0, 0, 0, 0),
        "update": PhasePeak(4 * GIB, 0, 0, 0, 0),
    }
    lines = [
        line.split() for line in PlanAccuracy({"load": GIB, "update": 5 * GIB}, memory).lines()
    ]
    assert lines[1:] == [
        ["load", "1.000", "2.000", "-50.0%"],
        ["update", "5.000", "4.000", "+25.0%"],
    ]

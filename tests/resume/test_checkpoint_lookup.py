"""`--ckpt_path`: which checkpoint is found, which is refused, and with which message."""

import shutil

import pytest
import torch
from run_cli import TWO_RANKS, checkpoint_argv, fit_argv, last, metrics, run, same, succeed

from lit_align.runs.checkpoint_files import list_checkpoints


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Folder of a run of one epoch: four iterations, saved after two and after four."""
    folder = tmp_path_factory.mktemp("half")
    succeed(fit_argv(folder / "run", "sft", *checkpoint_argv(2), epochs=1), folder / "log")
    return folder / "run"


@pytest.fixture
def copy(half, tmp_path):
    """A copy of that run that a test may damage."""
    return shutil.copytree(half, tmp_path / "run")


def error_of(argv, tmp_path) -> str:
    """Run a command that must fail and return its one-line error."""
    assert run(argv, tmp_path / "log") == [2]
    lines = [x for x in (tmp_path / "log").read_text().splitlines() if x.startswith("lit-align:")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    printed = succeed(
        fit_argv(tmp_path / "run", "sft", "--ckpt_path=last", epochs=1), tmp_path / "log"
    )
    assert printed.count("starts from the beginning") == 1


def test_a_finished_run_explains_how_to_extend_it(copy, tmp_path):
    before = last(copy), metrics(copy)
    printed = succeed(
        fit_argv(copy, "sft", *checkpoint_argv(2), "--ckpt_path=last", epochs=1), tmp_path / "log"
    )
    assert "this run is finished: 4 iterations, max_epochs 1. Raise --trainer.max_epochs" in printed
    assert same((last(copy)["state_dict"], metrics(copy)), (before[0]["state_dict"], before[1]))


def test_changed_settings_are_listed(copy, tmp_path):
    more = ("--ckpt_path=last", "--model.max_grad_norm=0.5", "--data.seed=7")
    printed = succeed(fit_argv(copy, "sft", *checkpoint_argv(2), *more), tmp_path / "log")
    changed = [line for line in printed.splitlines() if line.startswith("changed:")]
    assert sorted(changed) == [
        "changed: data.seed was 0, is 7",
        "changed: model.max_grad_norm was 1.0, is 0.5",
        "changed: trainer.max_epochs was 1, is 2",
    ]


def test_last_is_the_newest_readable_checkpoint(copy, tmp_path):
    older, newer = list_checkpoints(copy / "checkpoints")
    newer.write_bytes(newer.read_bytes()[:-100])
    printed = succeed(
        fit_argv(copy, "sft", *checkpoint_argv(2), "--ckpt_path=last"), tmp_path / "log"
    )
    assert f"{newer} cannot be read: it is truncated" in printed
    assert f"resuming from {older}, iteration 2" in printed
    assert last(copy)["iteration"] == 8


@pytest.mark.parametrize(
    "content", [lambda good: good[: len(good) // 2], lambda good: b"", lambda good: b"weights"]
)
def test_a_truncated_or_foreign_file_is_refused(copy, tmp_path, content):
    _, newer = list_checkpoints(copy / "checkpoints")
    newer.write_bytes(content(newer.read_bytes()))
    printed = error_of(fit_argv(copy, "sft", f"--ckpt_path={newer}"), tmp_path)
    assert f"{newer} cannot be read: it is truncated or not a checkpoint (" in printed


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    printed = error_of(
        fit_argv(tmp_path / "run", "sft", f"--ckpt_path={tmp_path}/other.ckpt"), tmp_path
    )
    assert "other.ckpt is not a checkpoint of a lit_align run." in printed


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("sprung",))

    torch.save({"algorithm": Trap()}, tmp_path / "trap.ckpt")
    printed = error_of(
        fit_argv(tmp_path / "run", "sft", f"--ckpt_path={tmp_path}/trap.ckpt"), tmp_path
    )
    assert "cannot be read" in printed
    assert "sprung\n" not in (tmp_path / "log").read_text()


def test_a_checkpoint_of_another_algorithm_is_refused(half, tmp_path):
    (*_, path) = list_checkpoints(half / "checkpoints")
    printed = error_of(fit_argv(tmp_path / "run", "reward_model", f"--ckpt_path={path}"), tmp_path)
    assert "was trained with SFT and cannot resume with RewardModel" in printed


def test_another_run_in_the_same_folder_moves_old_checkpoints(copy, tmp_path):
    printed = succeed(
        fit_argv(copy, "sft", *checkpoint_argv(0), "--model.max_grad_norm=0.1"), tmp_path / "log"
    )
    assert "2 checkpoint(s) of an earlier run" in printed
    assert [path.name for path in list_checkpoints(copy / "checkpoints")] == [
        "iteration_000008.ckpt"
    ]
    assert len(list_checkpoints(copy / "checkpoints" / "superseded")) == 2
    assert len([row for row in metrics(copy) if "loss" in row]) == 8


def test_a_resume_from_an_older_checkpoint_repeats_its_iterations(copy, half, tmp_path):
    path = copy / "checkpoints" / "iteration_000002.ckpt"
    printed = succeed(
        fit_argv(copy, "sft", *checkpoint_argv(2), f"--ckpt_path={path}", epochs=1),
        tmp_path / "log",
    )
    assert "1 checkpoint(s) of an earlier run" in printed
    assert same(last(copy)["state_dict"], last(half)["state_dict"])
    assert metrics(copy) == metrics(half)


LORA = ("--config", "lora", "--model.policy.lora.r=4")


@pytest.mark.parametrize(
    ("config", "more", "ranks"),
    [
        pytest.param("sft", (), (1, 2), marks=pytest.mark.long),
        pytest.param("sft", (), (2, 1), marks=pytest.mark.long),
        pytest.param("remax", LORA, (1, 2), marks=pytest.mark.long),
        ("remax", LORA, (2, 1)),  # frozen weights between trained ones
    ],
)
def test_weights_and_optimizer_resume_on_another_number_of_ranks(tmp_path, config, more, ranks):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = {1: (), 2: TWO_RANKS}
    before, after = ranks
    succeed(fit_argv(folder, config, *more, *flags[before], epochs=1), log, before)
    saved_there = last(folder)
    idle = ("--model.optimizer.lr=0", "--ckpt_path=last", *checkpoint_argv(5))
    printed = succeed(fit_argv(folder, config, *more, *flags[after], *idle), log, after)
    assert f"saved on {before} rank(s), resumed on {after}: weights, optimizer" in printed
    moved = last(folder)
    assert moved["iteration"] == 8
    assert not any("reference" in name or "base_layer" in name for name in moved["state_dict"])
    for name, weight in saved_there["state_dict"].items():
        assert torch.equal(moved["state_dict"][name], weight), name
    (state,), (old) = moved["optimizer_states"], saved_there["optimizer_states"][0]
    for name, values in old["state"].items():
        assert float(state["state"][name]["step"]) == 8
        assert not torch.equal(state["state"][name]["exp_avg"], values["exp_avg"])


@pytest.mark.long
def test_two_ranks_can_write_one_file(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    one_file = (*LORA, *TWO_RANKS, "--trainer.strategy.save_distributed_checkpoint=false")
    succeed(fit_argv(folder, "remax", *one_file, epochs=1), log, 2)
    (path,) = list_checkpoints(folder / "checkpoints")
    assert path.is_file()
    for more, ranks in ((one_file, 2), (LORA, 1)):
        other = shutil.copytree(folder, tmp_path / f"on {ranks}")
        succeed(
            fit_argv(other, "remax", *more, "--ckpt_path=last", *checkpoint_argv(5)), log, ranks
        )
        assert last(other)["iteration"] == 8
    long = tmp_path / "long"
    succeed(fit_argv(long, "remax", *one_file), log, 2)
    for part in ("state_dict", "optimizer_states"):
        assert same(last(long)[part], last(tmp_path / "on 2")[part]), part

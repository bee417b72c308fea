"""A run that is stopped or finished and resumed equals one long run."""

import re

import pytest
from run_cli import TWO_RANKS, assert_same_run, fit_argv, last, metrics, run, succeed

PPO = ("--model.kl_target=0.1", "--model.kl_horizon=50", "--model.normalize_scores=true")


@pytest.mark.parametrize(
    ("config", "more", "ranks"),
    [
        pytest.param("remax", (), 1, marks=pytest.mark.long),
        pytest.param("sft", ("--data.num_workers=1",), 1, marks=pytest.mark.long),
        ("ppo", PPO, 1),
        pytest.param("remax", TWO_RANKS, 2, marks=pytest.mark.long),
        pytest.param("ppo", (*TWO_RANKS, *PPO), 2, marks=pytest.mark.long),
    ],
)
def test_a_finished_run_can_be_extended(tmp_path, config, more, ranks):
    long, parts, log = tmp_path / "long", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(long, config, *more, epochs=2), log, ranks)
    succeed(fit_argv(parts, config, *more, epochs=1), log, ranks)
    assert last(parts)["iteration"] * 2 == last(long)["iteration"]
    printed = succeed(fit_argv(parts, config, *more, "--ckpt_path=last", epochs=2), log, ranks)
    assert "changed: trainer.max_epochs was 1, is 2" in printed
    assert printed.count("changed:") == 1
    assert_same_run(parts, long)


def signal_argv(name: str, iteration: int, times: int = 1) -> tuple[str, ...]:
    """Return the options that send a run a signal."""
    return (
        "--trainer.callbacks+=send_signals.SignalAt",
        f"--trainer.callbacks.name={name}",
        f"--trainer.callbacks.iteration={iteration}",
        f"--trainer.callbacks.times={times}",
    )


@pytest.mark.parametrize(
    ("config", "more", "ranks", "name", "iteration"),
    [
        pytest.param("remax", (), 1, "SIGTERM", 1, marks=pytest.mark.long),
        # the last iteration of an epoch: the validation after it runs too
        pytest.param("remax", (), 1, "SIGUSR1", 3, marks=pytest.mark.long),
        ("sft", ("--data.num_workers=1",), 1, "SIGINT", 5),
        pytest.param("ppo", PPO, 1, "SIGUSR1", 6, marks=pytest.mark.long),
        # only one rank gets the signal
        pytest.param("remax", TWO_RANKS, 2, "SIGTERM", 4, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_after_the_iteration_and_stops(
    tmp_path, config, more, ranks, name, iteration
):
    long, parts, log = tmp_path / "long", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(long, config, *more), log, ranks)
    printed = succeed(fit_argv(parts, config, *more, *signal_argv(name, iteration)), log, ranks)
    assert f"{name}: saving at the end of this iteration" in printed
    assert re.search(
        rf"stopped by {name} after iteration {iteration + 1}, saved as \S+"
        rf"iteration_00000{iteration + 1}.ckpt. To resume, run the same command with "
        rf"--ckpt_path last",
        printed,
    )
    assert last(parts)["iteration"] == iteration + 1
    printed = succeed(fit_argv(parts, config, *more, "--ckpt_path=last"), log, ranks)
    assert "changed" not in printed.replace("changed: trainer.callbacks", "")
    assert_same_run(parts, long)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    argv = fit_argv(tmp_path / "run", "remax", *signal_argv("SIGINT", 2, times=2))
    assert run(argv, tmp_path / "log") == [1]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_random_states_of_a_users_code_are_restored(tmp_path):
    more = ("--trainer.callbacks+=send_signals.RandomNumbers", "--trainer.num_sanity_val_steps=0")
    long, parts, log = tmp_path / "long", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(long, "sft", *more), log)
    succeed(fit_argv(parts, "sft", *more, *signal_argv("SIGTERM", 2)), log)
    succeed(fit_argv(parts, "sft", *more, "--ckpt_path=last"), log)
    numbers = [row["random_number"] for row in metrics(long) if "random_number" in row]
    assert len(set(numbers)) == 8
    assert [row["random_number"] for row in metrics(parts) if "random_number" in row] == numbers

"""N steps, an end, and N steps more are 2N steps: weights, optimizer, metrics, data."""

import re

import pytest
from run_cli import TWO_RANKS, assert_same_run, fit_argv, last, metrics, run, succeed

PPO = ("--model.kl_target=0.1", "--model.kl_horizon=50", "--model.normalize_scores=true")


@pytest.mark.parametrize(
    ("config", "more", "ranks"),
    [
        pytest.param("remax", (), 1, marks=pytest.mark.long),
        ("sft", ("--data.num_workers=1",), 1),
        ("ppo", PPO, 1),
        ("remax", TWO_RANKS, 2),
        pytest.param("ppo", (*TWO_RANKS, *PPO), 2, marks=pytest.mark.long),
    ],
)
def test_a_finished_run_that_is_made_longer_is_the_longer_run(tmp_path, config, more, ranks):
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(whole, config, *more, epochs=2), log, ranks)
    succeed(fit_argv(parts, config, *more, epochs=1), log, ranks)
    assert last(parts)["iteration"] * 2 == last(whole)["iteration"]
    said = succeed(fit_argv(parts, config, *more, "--ckpt_path=last", epochs=2), log, ranks)
    assert "changed: trainer.max_epochs was 1, is 2" in said
    assert said.count("changed:") == 1
    assert_same_run(parts, whole)


def signalled(name: str, iteration: int, times: int = 1) -> tuple[str, ...]:
    """The words that send a run a signal."""
    return (
        "--trainer.callbacks+=signalling.SignalAt",
        f"--trainer.callbacks.name={name}",
        f"--trainer.callbacks.iteration={iteration}",
        f"--trainer.callbacks.times={times}",
    )


@pytest.mark.parametrize(
    ("config", "more", "ranks", "name", "iteration"),
    [
        pytest.param("remax", (), 1, "SIGTERM", 1, marks=pytest.mark.long),
        ("remax", (), 1, "SIGUSR1", 3),  # the last one of an epoch: its validation is done, too
        ("sft", ("--data.num_workers=1",), 1, "SIGINT", 5),
        pytest.param("ppo", PPO, 1, "SIGUSR1", 6, marks=pytest.mark.long),
        ("remax", TWO_RANKS, 2, "SIGTERM", 4),  # one rank alone is told
    ],
)
def test_a_signal_saves_at_the_next_border_and_leaves(
    tmp_path, config, more, ranks, name, iteration
):
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(whole, config, *more), log, ranks)
    said = succeed(fit_argv(parts, config, *more, *signalled(name, iteration)), log, ranks)
    assert f"{name}: saving at the end of this iteration" in said
    assert re.search(
        rf"stopped by {name} after iteration {iteration + 1}, saved as \S+"
        rf"iteration_00000{iteration + 1}.ckpt. To resume, run the same command with "
        rf"--ckpt_path last",
        said,
    )
    assert last(parts)["iteration"] == iteration + 1
    said = succeed(fit_argv(parts, config, *more, "--ckpt_path=last"), log, ranks)
    assert "changed" not in said.replace("changed: trainer.callbacks", "")
    assert_same_run(parts, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    argv = fit_argv(tmp_path / "run", "remax", *signalled("SIGINT", 2, times=2))
    assert run(argv, tmp_path / "log") == [1]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_the_users_own_code_draws_goes_on_too(tmp_path):
    more = ("--trainer.callbacks+=signalling.Draws", "--trainer.num_sanity_val_steps=0")
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(whole, "sft", *more), log)
    succeed(fit_argv(parts, "sft", *more, *signalled("SIGTERM", 2)), log)
    succeed(fit_argv(parts, "sft", *more, "--ckpt_path=last"), log)
    drawn = [row["drawn"] for row in metrics(whole) if "drawn" in row]
    assert len(set(drawn)) == 8
    assert [row["drawn"] for row in metrics(parts) if "drawn" in row] == drawn

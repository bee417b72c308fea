"""Runs of several processes from the command line, and over two nodes."""

import csv
import re
from pathlib import Path

import pytest
from launch_processes import lit_align, wait_for

BROKEN = """
import os


def reward(prompts, completions, **columns):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the service is down")
    return [0.0] * len(prompts)
"""


def logged_losses(folder: Path) -> list[float]:
    """Return the losses that a run logged."""
    with (folder / "run" / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]


@pytest.mark.long
@pytest.mark.parametrize("config", ["ppo", "hydra_ppo"])
def test_ddp_trains_several_losses(tmp_path, config):
    argv = ("--config", config, "--config", "toy", "--trainer.strategy", "ddp")
    status, text = wait_for(lit_align(tmp_path, *argv, "--trainer.devices", "2"), 240)
    assert status == 0, text
    assert len(logged_losses(tmp_path)) == 2


@pytest.mark.long
def test_fsdp_selects_fsdp2_with_a_message(tmp_path):
    argv = ("--config", "sft", "--config", "toy", "--trainer.strategy", "fsdp")
    status, text = wait_for(lit_align(tmp_path, *argv, "--trainer.devices", "2"), 240)
    assert status == 0, text
    assert text.count("--trainer.strategy fsdp is read as fsdp2") == 1
    assert len(logged_losses(tmp_path)) == 2
    assert "strategy: fsdp2" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.long  # tests/scale/test_rank_failure.py has it without a launcher
def test_a_broken_reward_ends_all_processes(tmp_path):
    (tmp_path / "my_reward.py").write_text(BROKEN)
    argv = ("--config", "remax", "--config", "toy", "--trainer.strategy", "fsdp")
    more = ("--trainer.devices", "2", "--reward.functions.function", "my_reward.reward")
    status, text = wait_for(lit_align(tmp_path, *argv, *more), 240)
    assert status != 0
    assert text.count("--trainer.strategy fsdp is read as fsdp2") == 1
    assert re.search(
        r"lit-align: on rank 1: reward '\w+' raised OSError: the service is down", text
    )
    assert re.search(r"lit-align: reward '\w+' raised OSError: the service is down", text)


@pytest.mark.long
@pytest.mark.parametrize(("config", "processes"), [("remax", 1), ("sft", 1), ("remax", 2)])
def test_two_nodes_train_on_the_toy_task(tmp_path, port, config, processes):
    argv = ("--config", config, "--config", "toy", "--config", "multi_node")
    nodes = []
    for node in range(2):
        address = (
            "--node-rank",
            str(node),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
        )
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", *address)
        torchrun += ("--nproc-per-node", str(processes))
        more = (*argv, "--trainer.devices", str(processes))
        nodes.append(lit_align(tmp_path, *more, before=torchrun))
    for process in nodes:
        status, text = wait_for(process, 240)
        assert status == 0, text
    found = logged_losses(tmp_path)
    assert len(found) == 2

"""Runs of several processes from the command line, and over two nodes."""

import csv
import re
from pathlib import Path

import pytest
from launch_processes import ended, lit_align

BROKEN = """
import os


def reward(prompts, completions, **columns):
    if os.environ.get("LOCAL_RANK") == "1":
        raise OSError("the judge is out")
    return [0.0] * len(prompts)
"""


def losses(folder: Path) -> list[float]:
    """What a run logged."""
    with (folder / "run" / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]


@pytest.mark.long
@pytest.mark.parametrize("config", ["ppo", "hydra_ppo"])
def test_ddp_trains_what_has_several_losses(tmp_path, config):
    words = ("--config", config, "--config", "toy", "--trainer.strategy", "ddp")
    status, text = ended(lit_align(tmp_path, *words, "--trainer.devices", "2"), 240)
    assert status == 0, text
    assert len(losses(tmp_path)) == 2


@pytest.mark.long
def test_the_word_fsdp_means_fsdp2_and_says_so(tmp_path):
    words = ("--config", "sft", "--config", "toy", "--trainer.strategy", "fsdp")
    status, text = ended(lit_align(tmp_path, *words, "--trainer.devices", "2"), 240)
    assert status == 0, text
    assert text.count("--trainer.strategy fsdp means fsdp2 here") == 1
    assert len(losses(tmp_path)) == 2
    assert "strategy: fsdp2" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_broken_reward_ends_all_processes(tmp_path):
    (tmp_path / "judging.py").write_text(BROKEN)
    words = ("--config", "remax", "--config", "toy", "--trainer.strategy", "fsdp")
    more = ("--trainer.devices", "2", "--reward.functions.function", "judging.reward")
    status, text = ended(lit_align(tmp_path, *words, *more), 240)
    assert status != 0
    assert text.count("--trainer.strategy fsdp means fsdp2 here") == 1
    assert re.search(r"lit-align: on rank 1: reward '\w+' raised OSError: the judge is out", text)
    assert re.search(r"lit-align: reward '\w+' raised OSError: the judge is out", text)


@pytest.mark.long
@pytest.mark.parametrize(("config", "processes"), [("remax", 1), ("sft", 1), ("remax", 2)])
def test_two_nodes_train_on_the_toy_task(tmp_path, port, config, processes):
    words = ("--config", config, "--config", "toy", "--config", "multi_node")
    nodes = []
    for node in range(2):
        place = ("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port))
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", *place)
        torchrun += ("--nproc-per-node", str(processes))
        more = (*words, "--trainer.devices", str(processes))
        nodes.append(lit_align(tmp_path, *more, before=torchrun))
    for process in nodes:
        status, text = ended(process, 240)
        assert status == 0, text
    found = losses(tmp_path)
    assert len(found) == 2

"""Runs of the command line in processes that are forked from this one, which imported all."""

import csv
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded
from torch.utils import tensorboard
from transformers.models.llama import modeling_llama

from lit_align.cli.discovery import import_all
from lit_align.cli.main import main
from lit_align.runs.checkpoint_files import list_checkpoints
from lit_align.runs.checkpoint_io import AtomicCheckpointIO

TWO_RANKS = (
    "--data.batch_size=4",
    "--trainer.devices=2",
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
)
FSDP2 = ("--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=fsdp2")
ONLINE = {"remax", "grpo", "grpovi", "rloo", "ppo", "rto", "spr", "hydra_ppo", "joint_hydra_ppo"}
ONLINE |= {"dynamic_lora_ppo", "lora_ppo"}
assert all((sharded, tensorboard, modeling_llama))  # imported before the fork
import_all()


def fit_argv(folder: Path, config: str = "remax", *more: str, epochs: int = 2) -> list[str]:
    """Return a command line: epochs of four iterations on 32 toy rows, each with a validation."""
    online = ["--rollout.max_new_tokens=4"] if config in ONLINE else []
    return [
        *("fit", "--config", config, "--config", "toy", f"--trainer.max_epochs={epochs}"),
        *("--data.batch_size=8", "--data.max_rows=32", "--trainer.limit_val_batches=1"),
        *("--data.eval_batch_size=8", f"--trainer.default_root_dir={folder}"),
        *("--model.warmup_ratio=0", "--model.final_lr_ratio=1", *online, *more),
    ]


def checkpoint_argv(every: int, keep: int = 2, *more: str) -> tuple[str, ...]:
    """Return the options that set when to save."""
    name = "lit_align.callbacks.checkpoint.Checkpoints"
    return (
        f"--trainer.callbacks+={name}",
        f"--trainer.callbacks.every_n_iterations={every}",
        f"--trainer.callbacks.keep_last={keep}",
        *more,
    )


def start(
    argv: list[str], log: Path, ranks: int = 1, before: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """Fork one process per rank.

    Args:
        argv: The command line.
        log: File for all output.
        ranks: Number of processes, started as by torchrun.
        before: Function that each process calls first. Default: none.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes = []
    for rank in range(ranks):
        rank_variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
        }
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        group = {name: str(value) for name, value in {**rank_variables, **address}.items()}
        processes.append(
            context.Process(target=run_rank, args=(argv, log, group if ranks > 1 else {}, before))
        )
        processes[-1].start()
    return processes


def run_rank(
    argv: list[str], log: Path, group: dict[str, str], before: Callable[[], None] | None
) -> None:
    """Run one rank and exit."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    os.environ.update(group)
    os.setpgid(0, 0)  # so that a signal to the group reaches only this run
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(argv))


def run(
    argv: list[str], log: Path, ranks: int = 1, before: Callable[[], None] | None = None
) -> list[int | None]:
    """Return the exit codes of a run. If one rank fails, the others are killed."""
    processes = start(argv, log, ranks, before)
    for process in processes:
        process.join(1)
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.kill()
        for process in processes:
            process.join(0.1)
    return [process.exitcode for process in processes]


def succeed(argv: list[str], log: Path, ranks: int = 1) -> str:
    """Run a command that must succeed and return its output."""
    log.unlink(missing_ok=True)
    codes = run(argv, log, ranks)
    assert codes == [0] * ranks, log.read_text()
    return log.read_text()


def last(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run, unsharded."""
    return AtomicCheckpointIO().load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def metrics(folder: Path, since: int = 0) -> list[dict[str, str]]:
    """Return the text of all logged values from an optimizer step on, except times."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= since]
    return [{k: v for k, v in row.items() if v and not is_time(k)} for row in rows]


def is_time(metric: str) -> bool:
    """Return True if a metric depends on the machine's speed."""
    return metric.startswith("time/") or metric == "tokens_per_second"


def same(one: Any, other: Any) -> bool:
    """Return True if two nested containers are equal, with tensors equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_run(one: Path, other: Path) -> None:
    """Check that weights, optimizer states and logged metrics are equal bit by bit."""
    mine, theirs = last(one), last(other)
    assert mine["iteration"] == theirs["iteration"]
    for part in ("state_dict", "optimizer_states"):
        assert same(mine[part], theirs[part]), part
    assert metrics(one) == metrics(other)

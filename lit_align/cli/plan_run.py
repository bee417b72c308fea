"""Run `lit-align plan` on parsed arguments: build the run and simulate two batches."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from rich.console import Console

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.cli.align import AlignCLI
from lit_align.cli.overlays import resolve_configs
from lit_align.errors import UserError
from lit_align.plan.fake_cluster import FakeCluster
from lit_align.plan.max_length_data import MaxLengthData
from lit_align.plan.simulate import Machine, SimulatedRun, simulate_peaks
from lit_align.plan.suggestions import candidate_arguments, try_suggestions
from lit_align.plan.table import MemoryPlan, as_json, plan_table, verdict

DISTRIBUTED_STRATEGIES = ("fsdp", "ddp")  # how the names of distributed strategies begin


class PlanCLI(AlignCLI):
    """Parse the words of a `fit`, and build a trainer of one simulated rank without starting it.

    Args:
        args: The words after `fit`, their configs read.
        prompt_tokens: Length of each prompt or text. None: the maximum of the data section.
    """

    def __init__(self, args: list[str], prompt_tokens: int | None = None):
        self.prompt_tokens = prompt_tokens
        super().__init__(["fit", *args])

    def before_instantiate_classes(self) -> None:
        """Fill in settings as `fit` does, without a checkpoint to resume from."""
        config = self.config[self.config.subcommand]
        config.ckpt_path = None
        super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Read the machine from the settings; `build` instantiates the classes later.

        The networks must be built inside of the simulation, where tensors have no values.
        """
        config = self.config[self.config.subcommand]
        self.machine = machine_from_config(config.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer for two batches of the first rank."""
        config = self.config_init[self.config_init.subcommand]
        self.check_sections(config)
        settings, ranks = config.trainer, self.machine.ranks
        sections = [section for section in (config.rollout, config.reward) if section is not None]
        return Trainer(
            accelerator="cpu",  # also if the run is for a GPU, which is simulated
            devices=ranks // settings.num_nodes,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            plugins=[FakeCluster(ranks, ranks // settings.num_nodes)],
            callbacks=sections,
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        """Start nothing (LightningCLI 2.6 has no public switch in subcommand mode)."""

    def build(self) -> SimulatedRun:
        """Instantiate the classes, with a data module of maximum lengths."""
        super().instantiate_classes()
        config = self.config_init[self.config_init.subcommand]
        online = isinstance(self.model, OnlineAlgorithm)
        data = MaxLengthData(
            self.datamodule,
            self.prompt_tokens,
            response_tokens=config.rollout.max_new_tokens if online else 0,
            num_offline_samples=self.model.num_offline_samples if online else 0,
        )
        return SimulatedRun(self.trainer, self.model, data)


def machine_from_config(trainer: Namespace) -> Machine:
    """Return the machine of a trainer's settings.

    Args:
        trainer: The section `trainer` of a config.

    Example:
        >>> settings = {"devices": 4, "num_nodes": 2, "strategy": "fsdp2", "accelerator": "gpu"}
        >>> machine_from_config(Namespace(**settings)).ranks
        8
    """
    devices, strategy = trainer.devices, trainer.strategy
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    is_distributed = name.rpartition(".")[2].lower().startswith(DISTRIBUTED_STRATEGIES)
    if devices in ("auto", -1, "-1") and is_distributed:
        raise UserError(
            f"--trainer.devices {devices} would count the GPUs of this machine. Set it to the "
            f"number of GPUs per node that the run will have."
        )
    num_devices = 1 if devices in ("auto", -1, "-1") else count_devices(devices)
    ranks = num_devices * trainer.num_nodes
    if ranks > 1 and not is_distributed:
        raise UserError(
            f"{ranks} devices need a distributed strategy, found {name}. Set --trainer.strategy "
            f"fsdp2 to shard the weights over them, or ddp to copy them."
        )
    return Machine(
        ranks=ranks, is_gpu=trainer.accelerator != "cpu", has_process_group=is_distributed
    )


def count_devices(devices: Any) -> int:
    """Return the number of devices of `trainer.devices`: a number, or a list of indices.

    Example:
        >>> count_devices(8), count_devices("0,1,3"), count_devices([2])
        (8, 3, 1)
    """
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return len([part for part in text.split(",") if part]) if "," in text else int(text)


@contextmanager
def disable_logging() -> Iterator[None]:
    """Suppress the log output and the warnings of the simulated run, except errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_plan(words: list[str], options: argparse.Namespace) -> int:
    """Plan a run, and changes of it if it does not fit; return the exit status.

    Args:
        words: The words of a `fit`.
        options: The options of `plan`.
    """
    cli, plan = plan_once(words, options)
    if not options.json:
        Console(width=max(Console().width, 110)).print(plan_table(plan))
        print(verdict(plan))
    changes = [] if plan.fits else plan_suggestions(words, options, cli)
    if options.json:
        print(json.dumps({**as_json(plan), "changes": changes}))
    return 0 if plan.fits else 1


def plan_once(words: list[str], options: argparse.Namespace) -> tuple[PlanCLI, MemoryPlan]:
    """Simulate a run and return it with its memory.

    Args:
        words: The words of a `fit`.
        options: The options of `plan`.
    """
    cli = PlanCLI(resolve_configs(words), options.prompt_tokens)
    machine = cli.machine._replace(memory=options.gpu_memory)
    return cli, MemoryPlan(simulate_peaks(cli.build, machine), options.gpu_memory)


def plan_suggestions(
    words: list[str], options: argparse.Namespace, cli: PlanCLI
) -> list[dict[str, object]]:
    """Plan small changes of a run that does not fit, and print each as soon as it is planned.

    Args:
        words: The words of a `fit`.
        options: The options of `plan`.
        cli: The run without a change.
    """
    found: list[dict[str, object]] = []
    candidates = list(candidate_arguments(cli.config.fit, cli.machine.ranks))
    for change in try_suggestions(candidates, lambda argv: plan_once([*words, *argv], options)[1]):
        added, plan = " ".join(change.argv), change.plan
        message = f"refused: {plan}" if isinstance(plan, str) else verdict(plan)
        size = {} if isinstance(plan, str) else {"peak": plan.peak[1].total, "phase": plan.peak[0]}
        found.append({"words": added, "fits": change.fits, "message": message, **size})
        if not options.json:
            print(f"  with {added}: {message}", flush=True)
    return found

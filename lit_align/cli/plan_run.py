"""A run of `fit` as it is parsed, built where tensors have no values, and not started."""

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

DISTRIBUTED_STRATEGIES = ("fsdp", "ddp")  # how words of strategies begin for which ranks talk


class PlanCLI(AlignCLI):
    """Parses the words of a `fit`, and builds a trainer of one rank that nothing is started for.

    Args:
        args: As of `fit`.
        prompt_tokens: Of each prompt or text; by default the most that data allow.
    """

    def __init__(self, args: list[str], prompt_tokens: int | None = None):
        self.prompt_tokens = prompt_tokens
        super().__init__(["fit", *args])

    def before_instantiate_classes(self) -> None:
        """Nothing is resumed or written."""
        config = self.config[self.config.subcommand]
        config.ckpt_path = None
        super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Waits for `build`: until then nothing has told where the run is to be."""
        config = self.config[self.config.subcommand]
        self.machine = machine_from_config(config.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer for two batches of the first rank."""
        config = self.config_init[self.config_init.subcommand]
        self.check_sections(config)
        settings, ranks = config.trainer, self.machine.ranks
        sections = [section for section in (config.rollout, config.reward) if section is not None]
        return Trainer(
            accelerator="cpu",
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
        """Starts nothing."""

    def build(self) -> SimulatedRun:
        """What was parsed, as objects."""
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
    """Where a trainer's settings say that it runs.

    Args:
        trainer: The section of a config.
    """
    devices, strategy = trainer.devices, trainer.strategy
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    is_distributed = name.rpartition(".")[2].lower().startswith(DISTRIBUTED_STRATEGIES)
    if devices in ("auto", -1, "-1") and is_distributed:
        raise UserError(
            f"--trainer.devices {devices} counts the GPUs of this machine, and the plan may be for "
            f"another one: give their number."
        )
    num_devices = 1 if devices in ("auto", -1, "-1") else count_devices(devices)
    ranks = num_devices * trainer.num_nodes
    if ranks > 1 and not is_distributed:
        raise UserError(
            f"{ranks} devices need a strategy: --trainer.strategy fsdp2 splits the weights over "
            f"them, ddp copies them."
        )
    return Machine(
        ranks=ranks, is_gpu=trainer.accelerator != "cpu", has_process_group=is_distributed
    )


def count_devices(devices: Any) -> int:
    """How many devices are meant: a number, or a list of their own numbers."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return len([part for part in text.split(",") if part]) if "," in text else int(text)


@contextmanager
def disable_logging() -> Iterator[None]:
    """Suppress log output of the simulated run except errors."""
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
    """One run, and if it does not fit, small changes of it.

    Args:
        words: As of `fit`.
        options: The options of `plan`.
    """
    cli, plan = plan_once(words, options)
    if not options.json:
        Console(width=max(Console().width, 110)).print(plan_table(plan))
        print(verdict(plan))
    others = [] if plan.fits else plan_suggestions(words, options, cli)
    if options.json:
        print(json.dumps({**as_json(plan), "changes": others}))
    return 0 if plan.fits else 1


def plan_once(words: list[str], options: argparse.Namespace) -> tuple[PlanCLI, MemoryPlan]:
    """A run, and what it takes.

    Args:
        words: As of `fit`.
        options: The options of `plan`.
    """
    cli = PlanCLI(resolve_configs(words), options.prompt_tokens)
    machine = cli.machine._replace(memory=options.gpu_memory)
    return cli, MemoryPlan(simulate_peaks(cli.build, machine), options.gpu_memory)


def plan_suggestions(
    words: list[str], options: argparse.Namespace, cli: PlanCLI
) -> list[dict[str, object]]:
    """Small changes of a run that does not fit, each printed as soon as it is known.

    Args:
        words: As of `fit`.
        options: The options of `plan`.
        cli: The run as it is.
    """
    found: list[dict[str, object]] = []
    more = list(candidate_arguments(cli.config.fit, cli.machine.ranks))
    for change in try_suggestions(more, lambda added: plan_once([*words, *added], options)[1]):
        line, plan = " ".join(change.argv), change.plan
        told = f"refused: {plan}" if isinstance(plan, str) else verdict(plan)
        size = {} if isinstance(plan, str) else {"peak": plan.peak[1].total, "phase": plan.peak[0]}
        found.append({"words": line, "fits": change.fits, "told": told, **size})
        if not options.json:
            print(f"  with {line}: {told}", flush=True)
    return found

"""`lit-align fit --plan`: what a run takes, said before it begins."""

from __future__ import annotations

import os
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import _get_rank
from rich.console import Console

from lit_align.cli.plan import silent
from lit_align.cli.plan_run import PlannedCLI
from lit_align.models.weights.loading import quiet_transformers
from lit_align.plan.memory_tracker import Place
from lit_align.plan.simulate import simulated
from lit_align.plan.table import Plan, table, verdict


class PlannedHere(PlannedCLI):
    """Plans for the devices of this machine, where the words leave them to Lightning."""

    def before_instantiate_classes(self) -> None:
        """Finds out what `auto` means here."""
        super().before_instantiate_classes()
        settle(self.config[self.config.subcommand].trainer)


def settle(trainer: Namespace) -> None:
    """Writes down what Lightning would find: whether there is a GPU, and how many.

    Args:
        trainer: The section of a config.
    """
    has_card = torch.accelerator.is_available()
    if trainer.accelerator == "auto":
        trainer.accelerator = "gpu" if has_card else "cpu"
    if trainer.devices in ("auto", -1, "-1"):
        on_card = trainer.accelerator != "cpu"
        trainer.devices = torch.accelerator.device_count() if on_card else 1


def room(is_card: bool) -> int:
    """Bytes of this machine's first device.

    Args:
        is_card: Whether that is a GPU, or the host itself.
    """
    if is_card:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def foretold(args: list[Any]) -> dict[str, int]:
    """Prints the plan of a fit; bytes at the height of each phase. The first rank's alone.

    Args:
        args: The words behind `fit`, their configs read.
    """
    if _get_rank():  # as whoever starts the processes says; there is no group yet
        return {}
    with silent(), quiet_transformers():
        cli = PlannedHere(args)
        memory = room(cli.machine.is_card)
        plan = Plan(simulated(cli.build, cli.machine._replace(memory=memory)), memory)
    Console(width=max(Console().width, 110)).print(table(plan))
    print(verdict(plan), flush=True)
    return {phase: places[Place.DEVICE].total for phase, places in plan.heights.items()}

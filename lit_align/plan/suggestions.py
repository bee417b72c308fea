"""Small changes of a run that take less memory, from what costs least to what costs most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jsonargparse import Namespace

from lit_align.plan.table import Plan

Words = tuple[str, ...]  # of a command line


class Change(NamedTuple):
    """What a run would take.

    Args:
        words: To be added to the command line.
        plan: Of the run with them, or why it is refused.
    """

    words: Words
    plan: Plan | str

    @property
    def fits(self) -> bool:
        """Whether it would run."""
        return isinstance(self.plan, Plan) and self.plan.fits


def candidates(config: Namespace, ranks: int) -> Iterator[Words]:
    """What might be changed in a run: first what changes seconds, then what changes the training.

    Args:
        config: Of the run.
        ranks: It runs on.
    """
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    role = "policy" if "policy" in model else "reward_model"
    network = model[role].get("init_args", model[role])
    if model.microbatch_tokens > 1024:
        yield "--model.microbatch_tokens", str(max(model.microbatch_tokens // 4, 1024))
    if not network.checkpointing:
        yield f"--model.{role}.checkpointing", "true"
    yield from of_shards(trainer.strategy)
    words = ("--trainer.devices", str(2 * ranks // trainer.num_nodes))
    yield words if ranks > 1 else (*words, "--trainer.strategy", "fsdp2")
    if data.batch_size > 1:
        yield "--data.batch_size", str(data.batch_size // 2)
    if "galore" not in str(model.optimizer.class_path).lower():
        yield "--config", "galore"
    if network.lora is None:
        yield "--config", "lora"


def of_shards(strategy: Namespace | str) -> Iterator[Words]:
    """What FSDP2 may be told to keep less of.

    Args:
        strategy: A word or a class, of any kind.
    """
    if isinstance(strategy, Namespace) and strategy.class_path.endswith(".FSDP2"):
        if strategy.init_args.sum_once:
            yield "--trainer.strategy.sum_once", "false"
        if not strategy.init_args.cpu_offload:
            yield "--trainer.strategy.cpu_offload", "true"
    elif strategy in ("fsdp", "fsdp2"):
        as_class = ("--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2")
        yield *as_class, "--trainer.strategy.sum_once", "false"
        yield *as_class, "--trainer.strategy.cpu_offload", "true"


def changes(words: list[Words], planned: Callable[[Words], Plan]) -> Iterator[Change]:
    """Each change by itself; and if none of them makes the run fit, more and more of them.

    Args:
        words: Of each.
        planned: From words that are added to what the run takes then.
    """
    alone = []
    for change in words:
        alone.append(tried(change, planned))
        yield alone[-1]
    usable = [change for change in alone if isinstance(change.plan, Plan)]
    fits = any(change.fits for change in alone)
    together: Words = ()
    for number, change in enumerate(usable):
        together += change.words
        if number and not fits:
            more = tried(together, planned)
            fits = more.fits
            yield more


def tried(words: Words, planned: Callable[[Words], Plan]) -> Change:
    """A change that may be none for this run: its refusal is told to the user.

    Args:
        words: To be added.
        planned: As in `changes`.
    """
    try:
        return Change(words, planned(words))
    except ValueError as refusal:
        return Change(words, str(refusal))

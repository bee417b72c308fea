"""Suggestions to reduce memory, ordered by their effect on training, smallest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jsonargparse import Namespace

from lit_align.plan.table import MemoryPlan

Argv = tuple[str, ...]  # arguments of a command line


class Suggestion(NamedTuple):
    """A change of a run, and the memory of the changed run.

    Args:
        argv: Arguments to add to the command line.
        plan: Estimated memory of the changed run, or the message of its error.
    """

    argv: Argv
    plan: MemoryPlan | str

    @property
    def fits(self) -> bool:
        """Return True if the changed run is valid and fits in memory."""
        return isinstance(self.plan, MemoryPlan) and self.plan.fits


def candidate_arguments(config: Namespace, ranks: int) -> Iterator[Argv]:
    """Yield possible changes: first those that cost time, then those that change the training.

    Args:
        config: Configuration of the run.
        ranks: Number of ranks.
    """
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    role = "policy" if "policy" in model else "reward_model"
    network = model[role].get("init_args", model[role])
    # Smaller micro-batches, checkpointing and offloading only cost time.
    if model.microbatch_tokens > 1024:
        yield "--model.microbatch_tokens", str(max(model.microbatch_tokens // 4, 1024))
    if not network.activation_checkpointing:
        yield f"--model.{role}.activation_checkpointing", "true"
    yield from fsdp2_candidates(trainer.strategy)
    argv = ("--trainer.devices", str(2 * ranks // trainer.num_nodes))
    yield argv if ranks > 1 else (*argv, "--trainer.strategy", "fsdp2")
    # A smaller batch, GaLore and LoRA train differently.
    if data.batch_size > 1:
        yield "--data.batch_size", str(data.batch_size // 2)
    if "galore" not in str(model.optimizer.class_path).lower():
        yield "--config", "galore"
    if network.lora is None:
        yield "--config", "lora"


def fsdp2_candidates(strategy: Namespace | str) -> Iterator[Argv]:
    """Yield the changes that reduce the memory of FSDP2. Other strategies have none.

    Args:
        strategy: Name of a strategy, or a class with its arguments.

    Example:
        >>> [argv[-2:] for argv in fsdp2_candidates("fsdp2")][1]
        ('--trainer.strategy.cpu_offload', 'true')
        >>> list(fsdp2_candidates("ddp"))
        []
    """
    if isinstance(strategy, Namespace) and strategy.class_path.endswith(".FSDP2"):
        if not strategy.init_args.sync_every_microbatch:
            yield "--trainer.strategy.sync_every_microbatch", "true"
        if not strategy.init_args.cpu_offload:
            yield "--trainer.strategy.cpu_offload", "true"
    elif strategy in ("fsdp", "fsdp2"):
        # A strategy given by its short name has no arguments here, so use the class path.
        as_class = ("--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2")
        yield *as_class, "--trainer.strategy.sync_every_microbatch", "true"
        yield *as_class, "--trainer.strategy.cpu_offload", "true"


def try_suggestions(
    candidates: list[Argv], plan_with: Callable[[Argv], MemoryPlan]
) -> Iterator[Suggestion]:
    """Plan each change alone. If none fits, plan more and more of them together.

    Args:
        candidates: Arguments of each change.
        plan_with: Function of added arguments that returns the memory of the changed run.
    """
    single = []
    for candidate in candidates:
        single.append(try_suggestion(candidate, plan_with))
        yield single[-1]
    usable = [each for each in single if isinstance(each.plan, MemoryPlan)]
    fits = any(each.fits for each in single)
    combined: Argv = ()
    for number, each in enumerate(usable):
        combined += each.argv
        if number and not fits:  # the first alone has been planned already
            suggestion = try_suggestion(combined, plan_with)
            fits = suggestion.fits
            yield suggestion


def try_suggestion(argv: Argv, plan_with: Callable[[Argv], MemoryPlan]) -> Suggestion:
    """Plan one change. If it is invalid for this run, keep the error message.

    Args:
        argv: Arguments to add to the command line.
        plan_with: Function of added arguments that returns the memory of the changed run.

    Example:
        >>> def refuse(argv):
        ...     raise ValueError("no adapter")
        >>> try_suggestion(("--config", "lora"), refuse).plan
        'no adapter'
    """
    try:
        return Suggestion(argv, plan_with(argv))
    except ValueError as error:
        return Suggestion(argv, str(error))

"""Small changes of a run that take less memory, from what costs least to what costs most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jsonargparse import Namespace

from lit_align.plan.table import MemoryPlan

Argv = tuple[str, ...]  # of a command line


class Suggestion(NamedTuple):
    """What a run would take.

    Args:
        argv: To be added to the command line.
        plan: Of the run with them, or why it is refused.
    """

    argv: Argv
    plan: MemoryPlan | str

    @property
    def fits(self) -> bool:
        """Whether it would run."""
        return isinstance(self.plan, MemoryPlan) and self.plan.fits


def candidate_arguments(config: Namespace, ranks: int) -> Iterator[Argv]:
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
    if not network.activation_checkpointing:
        yield f"--model.{role}.activation_checkpointing", "true"
    yield from fsdp2_candidates(trainer.strategy)
    argv = ("--trainer.devices", str(2 * ranks // trainer.num_nodes))
    yield argv if ranks > 1 else (*argv, "--trainer.strategy", "fsdp2")
    if data.batch_size > 1:
        yield "--data.batch_size", str(data.batch_size // 2)
    if "galore" not in str(model.optimizer.class_path).lower():
        yield "--config", "galore"
    if network.lora is None:
        yield "--config", "lora"


def fsdp2_candidates(strategy: Namespace | str) -> Iterator[Argv]:
    """What FSDP2 may be told to keep less of.

    Args:
        strategy: A word or a class, of any kind.
    """
    if isinstance(strategy, Namespace) and strategy.class_path.endswith(".FSDP2"):
        if not strategy.init_args.sync_every_microbatch:
            yield "--trainer.strategy.sync_every_microbatch", "true"
        if not strategy.init_args.cpu_offload:
            yield "--trainer.strategy.cpu_offload", "true"
    elif strategy in ("fsdp", "fsdp2"):
        as_class = ("--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2")
        yield *as_class, "--trainer.strategy.sync_every_microbatch", "true"
        yield *as_class, "--trainer.strategy.cpu_offload", "true"


def try_suggestions(
    candidates: list[Argv], plan_with: Callable[[Argv], MemoryPlan]
) -> Iterator[Suggestion]:
    """Each change by itself; and if none of them makes the run fit, more and more of them.

    Args:
        candidates: Of each.
        plan_with: From words that are added to what the run takes then.
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
        if number and not fits:
            suggestion = try_suggestion(combined, plan_with)
            fits = suggestion.fits
            yield suggestion


def try_suggestion(argv: Argv, plan_with: Callable[[Argv], MemoryPlan]) -> Suggestion:
    """A change that may be none for this run: its error is told to the user.

    Args:
        argv: To be added.
        plan_with: As in `try_suggestions`.
    """
    try:
        return Suggestion(argv, plan_with(argv))
    except ValueError as error:
        return Suggestion(argv, str(error))

"""Phases of a run (load, rollout, score, prepare, update) and the listeners that observe them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

LESS_MEMORY = "train adapters (--config lora), or shard over more GPUs (--config fsdp)."
OUT_OF_MEMORY_ADVICE = {  # settings that lower the memory, by phase
    "load": f"Set --model.policy.dtype bfloat16, {LESS_MEMORY}",
    "rollout": "Lower --data.batch_size, --model.num_samples or --rollout.max_new_tokens.",
    "score": "Lower --reward.functions.tokens_per_pass or --data.batch_size, or use a smaller "
    "reward model.",
    "prepare": f"Lower --model.microbatch_tokens, {LESS_MEMORY}",
    "update": "Lower --model.microbatch_tokens, set --model.policy.activation_checkpointing true, "
    "or train adapters (--config lora).",
}


class PhaseListener(Protocol):
    """Receives the start and the end of each phase: load, rollout, score, prepare, update."""

    def begin(self, phase: str) -> None:
        """Receive the start of a phase."""

    def end(self, phase: str) -> None:
        """Receive the end of a phase. An exception inside the phase skips this call."""


@contextmanager
def run_phase(name: str, listeners: Iterable[PhaseListener]) -> Iterator[None]:
    """Call the listeners before and after the block, and explain an out-of-memory error in it.

    Args:
        name: load, rollout, score, prepare or update.
        listeners: Called in their order.

    Example:
        >>> class Recorder:
        ...     begin = end = print
        >>> with run_phase("update", [Recorder]):
        ...     print("step")
        update
        step
        update
    """
    for listener in listeners:
        listener.begin(name)
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = f"Out of memory in phase {name}: {OUT_OF_MEMORY_ADVICE[name]} {error}"
        raise torch.OutOfMemoryError(message) from error
    for listener in listeners:
        listener.end(name)

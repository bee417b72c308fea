"""The phases of a run (load, rollout, score, prepare, update) and those who listen to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

LESS_MEMORY = "or train adapters (--config lora), or shard over more GPUs (--config fsdp)."
OUT_OF_MEMORY_ADVICE = {  # what to change when memory runs out, by phase
    "load": f"Out of memory in phase load: set --model.policy.dtype bfloat16, {LESS_MEMORY}",
    "rollout": "Out of memory in phase rollout: lower --data.batch_size, --model.num_samples or "
    "--rollout.max_new_tokens.",
    "score": "Out of memory in phase score: lower --reward.functions.tokens_per_pass, "
    "take a smaller "
    "reward model, or --data.batch_size.",
    "prepare": f"Out of memory in phase prepare: lower --model.microbatch_tokens, {LESS_MEMORY}",
    "update": "Out of memory in phase update: lower --model.microbatch_tokens, set "
    "--model.policy.activation_checkpointing true, or train adapters (--config lora).",
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
    """
    for listener in listeners:
        listener.begin(name)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY_ADVICE[name]} {error}") from error
    for listener in listeners:
        listener.end(name)

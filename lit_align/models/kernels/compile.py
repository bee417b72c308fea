"""Blocks and decode steps as fewer, larger kernels: torch.compile where it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

MIN_RECOMPILE_LIMIT = 64  # networks x gradients x adapters


def compile_blocks(blocks: Iterable[nn.Module], uses_checkpointing: bool) -> None:
    """Lets each block compile itself where it is first called, for texts of any length.

    What is compiled for one block serves all that are alike. Keys of a state dict stay.

    Args:
        blocks: The transformer blocks of a network.
        uses_checkpointing: Whether they keep only their inputs and recompute the rest.
    """
    limits = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, MIN_RECOMPILE_LIMIT)
    for block in blocks:
        # The underscored attributes are private; checked with torch 2.13 and transformers 5.23.
        # torch's `checkpoint_wrapper` would replace them, but its module is private, too. It also
        # changes the names in `named_parameters`, and checkpoints in eval mode.
        block.compile(dynamic=True)
        compiled = block._compiled_call_impl
        if uses_checkpointing and compiled is not None:
            vars(block).update(
                _gradient_checkpointing_func=compiled_checkpoint,
                _compiled_call_impl=partial(call_by_mode, block, compiled),
            )


def call_by_mode(block: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block that trains as it is, since it compiles itself inside of its checkpoint.

    Args:
        block: Any.
        compiled: The same, compiled from outside.
        *args: Of the block.
        **kwargs: Of the block.
    """
    return (block._call_impl if block.training else compiled)(*args, **kwargs)


def call_function(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of its arguments."""
    return function(*args)


compiled_call = torch.compile(call_function, dynamic=True)


def compiled_checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    """A block that keeps its inputs alone, and is compiled inside of that.

    Outside it would not be compiled at all, and would not say so: attention breaks the graph, and
    a checkpoint in a graph must not be broken. torch forbids to compile inside of its
    `checkpoint`, but not inside of what that wraps (checked with torch 2.13).

    Args:
        block: With its other arguments.
        *args: Of the block.
    """
    return unwrap(checkpoint)(compiled_call, block, *args, use_reentrant=False)


def run_trunk(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """[N, t, H]: the last hidden state.

    Args:
        network: A causal language model.
        **inputs: Of its base model.
    """
    hidden: Tensor = network.base_model(**inputs).last_hidden_state
    return hidden


run_trunk_compiled = torch.compile(run_trunk, fullgraph=True)  # when it is first called


def run_trunk_eager(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """The same without what blocks have compiled: keys and values that grow are each layer's own.

    Args:
        network: A causal language model.
        **inputs: Of its base model.
    """
    with torch.compiler.set_stance("force_eager"):
        return run_trunk(network, **inputs)


def mark_dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """The tensor, whose dimensions need not be what they are when it is next compiled for.

    Args:
        tensor: Any.
        dims: Which.
    """
    # torch 2.13; `mark_dynamic` would raise if a dimension turned out to be static
    torch._dynamo.maybe_mark_dynamic(tensor, list(dims))
    return tensor

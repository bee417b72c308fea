"""Compilation of transformer blocks and of the decode step with torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# A block is compiled again for each network, gradient mode and adapter state. torch's default
# limit of 8 would silently fall back to eager mode.
MIN_RECOMPILE_LIMIT = 64


def compile_blocks(blocks: Iterable[nn.Module], uses_checkpointing: bool) -> None:
    """Compile each block on its first call, for sequences of any length.

    Blocks of equal structure share one graph. The keys of the state dict do not change.

    Args:
        blocks: Transformer blocks of a network.
        uses_checkpointing: Use True if training keeps only the inputs of the blocks and recomputes
            the rest in backward.
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
    """Call a block in eager mode while it trains, and its compiled version otherwise.

    A training block is compiled inside its checkpoint (`compiled_checkpoint`), not around it.

    Args:
        block: Transformer block.
        compiled: Compiled call of the same block.
        *args: Arguments of the block.
        **kwargs: Keyword arguments of the block.
    """
    # `_call_impl` is private to torch (checked with 2.13): the call of a module, hooks included.
    return (block._call_impl if block.training else compiled)(*args, **kwargs)


def call_block(block: Callable[..., Any], *args: Any) -> Any:
    """Return the output of a block, so that one compiled function serves all blocks."""
    return block(*args)


compiled_call = torch.compile(call_block, dynamic=True)


def compiled_checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    """Call a block under activation checkpointing, compiled inside the checkpoint.

    Compilation around the checkpoint would have no effect and no message. Attention breaks the
    graph, and torch runs a checkpoint with a broken graph in eager mode.

    Args:
        block: Transformer block, with its keyword arguments bound.
        *args: Positional arguments of the block.
    """
    # torch disables the compiler inside `checkpoint`, but not inside the function that its
    # decorator wraps (checked with torch 2.13).
    return unwrap(checkpoint)(compiled_call, block, *args, use_reentrant=False)


def run_trunk(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden states [N, T, H] of token ids [N, T].

    Args:
        network: Causal language model.
        **inputs: Inputs of its base model, such as `input_ids` [N, T].
    """
    hidden: Tensor = network.base_model(**inputs).last_hidden_state
    return hidden


# Compiled on the first call. With `fullgraph` a graph break is an error instead of a slow step.
run_trunk_compiled = torch.compile(run_trunk, fullgraph=True)


def run_trunk_eager(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden states [N, T, H] of token ids [N, T] without compiled blocks.

    Args:
        network: Causal language model.
        **inputs: Inputs of its base model, such as `input_ids` [N, T].
    """
    # A growing KV cache is different Python state in each layer, so that torch.compile would
    # compile every layer for itself.
    with torch.compiler.set_stance("force_eager"):
        return run_trunk(network, **inputs)


def mark_dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """Mark dimensions as dynamic for the next compilation and return the same tensor.

    Args:
        tensor: Tensor of any shape.
        dims: Dimensions whose size may differ in a later call.
    """
    # Private to torch (checked with 2.13). The public `mark_dynamic` raises an error if a dimension
    # turns out to be static.
    torch._dynamo.maybe_mark_dynamic(tensor, list(dims))
    return tensor

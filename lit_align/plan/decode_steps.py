"""Simulated rollout: the first and last passes only, with a cache of the size between them.

Shapes: N rows, B prompts of P tokens, R response tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_align.batches import Experience
from lit_align.models.generation.decode import (
    DecodeState,
    ResponseBuffer,
    Responses,
    SamplingParams,
)
from lit_align.models.generation.prefill import PrefillOutput, PromptTensors, prefill_chunk
from lit_align.models.generation.static_cache import StaticDecodeState

# Tokens that are decoded at the end. The cache grows with each, so the last one has the peak.
NUM_LAST_TOKENS = 2


def decode_first_and_last(
    state: DecodeState,
    prompts: Experience,
    noise: Tensor,
    is_greedy: Tensor,
    stop_ids: Tensor,
    pad_id: int,
    temperature: float,
    sampling: SamplingParams,
    all_ranks_done: Callable[[bool], bool] = bool,
) -> Responses:
    """Replace `decode` if no response ends early: decode the first and the last tokens.

    Args:
        state: State after prefill.
        prompts: N prompts.
        noise: [N, R] uniform in [0, 1).
        is_greedy: [N] bool, True for rows that take the most likely token.
        stop_ids: [S] ids of stop tokens.
        pad_id: Token id after the stop token.
        temperature: Divisor of the logits.
        sampling: Top-k and top-p.
        all_ranks_done: Not called, because no row stops.
    """
    length = noise.shape[1]
    buffer = ResponseBuffer(prompts, noise, is_greedy, pad_id)
    for step in [0, *range(max(length - NUM_LAST_TOKENS, 1), length)]:
        ids = buffer.sample_next(step, state.next_token_logprobs(temperature), stop_ids, sampling)
        if step == 0:
            extend_context(state, max(length - NUM_LAST_TOKENS, 1) - 1)
        if step + 1 < length:
            state.append(ids)
    return Responses(buffer.tokens, buffer.logprobs)


def extend_context(state: DecodeState, tokens: int) -> None:
    """Change a decode state as if more tokens had been decoded.

    Args:
        state: State of the decode loop, changed in place.
        tokens: Number of tokens.
    """
    if isinstance(state, StaticDecodeState):  # its cache has its full length already
        state.num_cached += tokens
        state.positions.add_(tokens)
        return
    state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), tokens)], 1)
    state.positions = state.positions[:, -1:] + tokens
    for layer in state.cache.layers:
        # transformers keeps one token less than the window, because the new one is added to it.
        window = layer.sliding_window - 1 if layer.is_sliding else None
        if layer.is_sliding:
            layer.cumulative_length += tokens
        # One tensor at a time, as in a decode step, so that the peak is not counted too high.
        layer.keys = extended_zeros(layer.keys, tokens, window)
        layer.values = extended_zeros(layer.values, tokens, window)


def extended_zeros(old: Tensor, tokens: int, max_tokens: int | None) -> Tensor:
    """Return zeros in the shape of keys or values with more tokens.

    Args:
        old: Keys or values [N, key heads, T, D].
        tokens: Number of tokens to add.
        max_tokens: Largest number of tokens, in a sliding window. None means no limit.

    Returns:
        Zeros [N, key heads, min(T + tokens, max_tokens), D].

    Example:
        >>> extended_zeros(torch.ones(1, 2, 3, 4), tokens=5, max_tokens=None).shape
        torch.Size([1, 2, 8, 4])
    """
    shape = list(old.shape)
    shape[-2] = min(shape[-2] + tokens, max_tokens or shape[-2] + tokens)
    return old.new_zeros(shape)


def prefill_first_and_last(
    network: PreTrainedModel, chunks: list[PromptTensors]
) -> list[PrefillOutput]:
    """Replace `prefill_chunks`: run the first and the last chunk, and fill in the others.

    Args:
        network: Causal language model.
        chunks: Token ids [B', P] of each chunk, B rows together.

    Returns:
        KV cache and hidden states [B', H] of each chunk.
    """
    outputs = [prefill_chunk(network, chunks[0])]
    for chunk in chunks[1:-1]:
        # Only the memory of these chunks matters, so zeros of the same shapes are enough.
        cache = DynamicCache(config=network.config)
        for number, layer in enumerate(outputs[0].cache.layers):
            if layer.keys is not None:
                cache.update(
                    *(zeros_like_chunk(old, chunk) for old in (layer.keys, layer.values)), number
                )
        outputs.append(PrefillOutput(cache, zeros_like_chunk(outputs[0].hidden, chunk)))
    return [*outputs, *(prefill_chunk(network, chunk) for chunk in chunks[1:][-1:])]


def zeros_like_chunk(first: Tensor, chunk: PromptTensors) -> Tensor:
    """Return zeros shaped like an output of the first chunk, with the rows of another chunk.

    Args:
        first: Output [B, ...] of the first chunk.
        chunk: Prompts of the other chunk, B' rows.

    Returns:
        Zeros [B', ...].

    Example:
        >>> column = torch.zeros(3, 1)
        >>> zeros_like_chunk(torch.ones(2, 5), PromptTensors(column, column, column)).shape
        torch.Size([3, 5])
    """
    return first.new_zeros(len(chunk.tokens), *first.shape[1:])

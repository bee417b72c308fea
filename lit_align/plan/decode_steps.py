"""A rollout's first and last passes, with the cache that all between them would have left."""

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

NUM_LAST_TOKENS = 2  # tokens that are decoded; each is the largest so far


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
    """`decode` where no answer ends early, without the tokens between the first and the last.

    Args:
        state: As in `decode`, and so are the others.
        prompts: N rows.
        noise: [N, R].
        is_greedy: [N] bool.
        stop_ids: [S] token ids.
        pad_id: Token id.
        temperature: Divides the logits.
        sampling: What may be chosen.
        all_ranks_done: Never asked, since no row stops.
    """
    length = noise.shape[1]
    buffer = ResponseBuffer(prompts, noise, is_greedy, pad_id)
    for step in [0, *range(max(length - NUM_LAST_TOKENS, 1), length)]:
        next_tokens = buffer.sample_next(
            step, state.next_token_logprobs(temperature), stop_ids, sampling
        )
        if step == 0:
            extend_context(state, max(length - NUM_LAST_TOKENS, 1) - 1)
        if step + 1 < length:
            state.append(next_tokens)
    return Responses(buffer.tokens, buffer.logprobs)


def extend_context(state: DecodeState, tokens: int) -> None:
    """The context after so many more tokens."""
    if isinstance(state, StaticDecodeState):  # has room for all of them
        state.num_cached += tokens
        state.positions.add_(tokens)
        return
    state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), tokens)], 1)
    state.positions = state.positions[:, -1:] + tokens
    for layer in state.cache.layers:
        window = layer.sliding_window - 1 if layer.is_sliding else None
        if layer.is_sliding:
            layer.cumulative_length += tokens
        layer.keys = extended_zeros(layer.keys, tokens, window)  # one at a time, as they grow
        layer.values = extended_zeros(layer.values, tokens, window)


def extended_zeros(old: Tensor, tokens: int, max_tokens: int | None) -> Tensor:
    """[N, heads, t, d] keys or values of more tokens, of `most` at most."""
    shape = list(old.shape)
    shape[-2] = min(shape[-2] + tokens, max_tokens or shape[-2] + tokens)
    return old.new_zeros(shape)


def prefill_first_and_last(
    network: PreTrainedModel, chunks: list[PromptTensors]
) -> list[PrefillOutput]:
    """`prefill_chunks`, of which only the first and the last are read.

    Args:
        network: A causal language model.
        chunks: Of the prompts.
    """
    outputs = [prefill_chunk(network, chunks[0])]
    for chunk in chunks[1:-1]:
        cache = DynamicCache(config=network.config)
        for number, layer in enumerate(outputs[0].cache.layers):
            if layer.keys is not None:
                cache.update(
                    *(zeros_like_chunk(old, chunk) for old in (layer.keys, layer.values)), number
                )
        outputs.append(PrefillOutput(cache, zeros_like_chunk(outputs[0].hidden, chunk)))
    return [*outputs, *(prefill_chunk(network, chunk) for chunk in chunks[1:][-1:])]


def zeros_like_chunk(first: Tensor, chunk: PromptTensors) -> Tensor:
    """What a part leaves in the place of what the first has left."""
    return first.new_zeros(len(chunk.tokens), *first.shape[1:])

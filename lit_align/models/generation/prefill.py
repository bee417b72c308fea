"""What prompts leave behind, keys and values, without reading more at once than fills a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_align.models.kernels.compile import run_trunk_eager

PREFILL_CHUNK_TOKENS = 2**14  # tokens: what more would take is memory alone


class PromptTensors(NamedTuple):
    """G prompts of T tokens at most."""

    tokens: Tensor  # [G, T] token ids, left-padded
    mask: Tensor  # [G, T] 1 at real tokens
    positions: Tensor  # [G, T]

    def rows(self, rows: Tensor) -> PromptTensors:
        """Those at [n] places."""
        return PromptTensors(*(each[rows] for each in self))


class PrefillOutput(NamedTuple):
    """What a network keeps of prompts that it has read."""

    cache: Cache
    hidden: Tensor  # [G, H] of the last token


def prefill(
    network: PreTrainedModel, prompts: PromptTensors, max_over_ranks: Callable[[int], int] = int
) -> PrefillOutput:
    """Reads prompts in as many passes as PREFILL_CHUNK_TOKENS asks for.

    Args:
        network: A causal language model with whole weights, or with shards that each pass gathers.
        prompts: G rows.
        max_over_ranks: The largest of a number on all ranks, which make equally many passes.
    """
    rows = torch.arange(len(prompts.tokens), device=prompts.tokens.device)
    chunk_rows = (
        max(1, PREFILL_CHUNK_TOKENS // prompts.tokens.shape[1])
        if has_plain_kv_cache(network)
        else len(rows)
    )
    number = max_over_ranks(-(-len(rows) // chunk_rows))
    number = -max_over_ranks(-min(number, len(rows)))  # a pass of each rank has a row at least
    chunks = prefill_chunks(network, [prompts.rows(chunk) for chunk in rows.tensor_split(number)])
    hidden = torch.cat([chunk.hidden for chunk in chunks])
    return PrefillOutput(concat_caches([chunk.cache for chunk in chunks]), hidden)


def has_plain_kv_cache(network: PreTrainedModel) -> bool:
    """Whether all that its layers keep are keys and values."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in DynamicCache(config=network.config).layers)


def prefill_chunks(network: PreTrainedModel, chunks: list[PromptTensors]) -> list[PrefillOutput]:
    """One pass for each chunk of the prompts."""
    return [prefill_chunk(network, chunk) for chunk in chunks]


def prefill_chunk(network: PreTrainedModel, chunk: PromptTensors) -> PrefillOutput:
    """A pass over some prompts."""
    cache = DynamicCache(config=network.config)
    hidden = run_trunk_eager(
        network,
        input_ids=chunk.tokens,
        attention_mask=chunk.mask,
        position_ids=chunk.positions,
        past_key_values=cache,
        use_cache=True,
    )
    return PrefillOutput(cache, hidden[:, -1].clone())  # the other tokens' need not stay


def concat_caches(caches: list[Cache]) -> Cache:
    """The rows of all caches, whose own layers are given away one by one."""
    first, *others = caches
    for number, layer in enumerate(first.layers):
        rest = [other.layers[number] for other in others]
        if rest and layer.keys is not None:  # layers may read those of another
            layer.keys = torch.cat([layer.keys, *(each.keys for each in rest)])
            layer.values = torch.cat([layer.values, *(each.values for each in rest)])
        for each in rest:
            each.keys = each.values = None
    return first

"""Prefill: run prompts through the model in chunks and return the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_align.models.kernels.compile import run_trunk_eager

# Tokens of a chunk. This many keep a GPU busy, and more would only take more memory.
PREFILL_CHUNK_TOKENS = 2**14


class PromptTensors(NamedTuple):
    """B prompts of P tokens, left-padded."""

    tokens: Tensor  # [B, P] token ids
    mask: Tensor  # [B, P] 1 for real tokens, 0 for padding
    positions: Tensor  # [B, P] position ids

    def rows(self, rows: Tensor) -> PromptTensors:
        """Return the prompts at the indices `rows` [n].

        Example:
            >>> column = torch.tensor([[5], [6], [7]])
            >>> PromptTensors(column, column, column).rows(torch.tensor([2, 0])).tokens.tolist()
            [[7], [5]]
        """
        return PromptTensors(*(each[rows] for each in self))


class PrefillOutput(NamedTuple):
    """KV cache and last hidden states of B prompts."""

    cache: Cache
    hidden: Tensor  # [B, H] of the last token


def prefill(
    network: PreTrainedModel, prompts: PromptTensors, max_over_ranks: Callable[[int], int] = int
) -> PrefillOutput:
    """Run prompts through a network in chunks of at most PREFILL_CHUNK_TOKENS tokens.

    Args:
        network: Causal language model with unsharded weights, or with shards that each pass
            gathers.
        prompts: Token ids [B, P], with masks and positions.
        max_over_ranks: Function that returns the maximum of a number over all ranks. Default: one
            rank, or ranks with unsharded weights.

    Returns:
        KV cache, and hidden states [B, H] of the last tokens.
    """
    rows = torch.arange(len(prompts.tokens), device=prompts.tokens.device)
    # A layer with other state than keys and values cannot be concatenated: one chunk.
    chunk_rows = (
        max(1, PREFILL_CHUNK_TOKENS // prompts.tokens.shape[1])
        if has_plain_kv_cache(network)
        else len(rows)
    )
    # Sharded ranks must run the same number of passes. That is the largest number of chunks,
    # limited by the smallest number of rows.
    number = max_over_ranks(-(-len(rows) // chunk_rows))
    number = -max_over_ranks(-min(number, len(rows)))
    chunks = prefill_chunks(network, [prompts.rows(chunk) for chunk in rows.tensor_split(number)])
    hidden = torch.cat([chunk.hidden for chunk in chunks])
    return PrefillOutput(concat_caches([chunk.cache for chunk in chunks]), hidden)


def has_plain_kv_cache(network: PreTrainedModel) -> bool:
    """Return True if the cache of every layer holds keys and values only.

    Args:
        network: Causal language model.
    """
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in DynamicCache(config=network.config).layers)


def prefill_chunks(network: PreTrainedModel, chunks: list[PromptTensors]) -> list[PrefillOutput]:
    """Run each chunk of the prompts through a network.

    Args:
        network: Causal language model.
        chunks: Token ids [B', P] of each chunk, B rows together.

    Returns:
        KV cache and hidden states [B', H] of each chunk.
    """
    return [prefill_chunk(network, chunk) for chunk in chunks]


def prefill_chunk(network: PreTrainedModel, chunk: PromptTensors) -> PrefillOutput:
    """Run one chunk of the prompts through a network.

    Args:
        network: Causal language model.
        chunk: Token ids [B, P], with masks and positions.

    Returns:
        KV cache, and hidden states [B, H] of the last tokens.
    """
    cache = DynamicCache(config=network.config)
    hidden = run_trunk_eager(
        network,
        input_ids=chunk.tokens,
        attention_mask=chunk.mask,
        position_ids=chunk.positions,
        past_key_values=cache,
        use_cache=True,
    )
    # A clone, because a slice would keep the hidden states of all P tokens in memory.
    return PrefillOutput(cache, hidden[:, -1].clone())


def concat_caches(caches: list[Cache]) -> Cache:
    """Concatenate the rows of several caches into the first one.

    Args:
        caches: Caches of equal width. All but the first are emptied.
    """
    first, *others = caches
    for number, layer in enumerate(first.layers):
        rest = [other.layers[number] for other in others]
        # A layer has no keys if it shares those of another layer.
        if rest and layer.keys is not None:
            layer.keys = torch.cat([layer.keys, *(each.keys for each in rest)])
            layer.values = torch.cat([layer.values, *(each.values for each in rest)])
        # Freed layer by layer, so that only one layer is in memory twice.
        for each in rest:
            each.keys = each.values = None
    return first

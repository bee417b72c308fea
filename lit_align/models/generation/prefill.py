"""What prompts leave behind, keys and values, without reading more at once than fills a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_align.models.kernels.compile import eager_trunk

READ_AT_ONCE = 2**14  # tokens: what more would take is memory alone


class Prompts(NamedTuple):
    """G prompts of T tokens at most."""

    tokens: Tensor  # [G, T] token ids, left-padded
    mask: Tensor  # [G, T] 1 at real tokens
    positions: Tensor  # [G, T]

    def rows(self, rows: Tensor) -> Prompts:
        """Those at [n] places."""
        return Prompts(*(each[rows] for each in self))


class Begun(NamedTuple):
    """What a network keeps of prompts that it has read."""

    cache: Cache
    hidden: Tensor  # [G, H] of the last token


def prefill(network: PreTrainedModel, prompts: Prompts, alike: Callable[[int], int] = int) -> Begun:
    """Reads prompts in as many passes as READ_AT_ONCE asks for.

    Args:
        network: A causal language model with whole weights, or with shards that each pass gathers.
        prompts: G rows.
        alike: The largest of a number on all ranks: shards need equally many passes of all.
    """
    rows = torch.arange(len(prompts.tokens), device=prompts.tokens.device)
    at_once = max(1, READ_AT_ONCE // prompts.tokens.shape[1]) if splits(network) else len(rows)
    number = alike(-(-len(rows) // at_once))
    number = -alike(-min(number, len(rows)))  # a pass of each rank has a row at least
    parts = read_parts(network, [prompts.rows(part) for part in rows.tensor_split(number)])
    hidden = torch.cat([part.hidden for part in parts])
    return Begun(joined([part.cache for part in parts]), hidden)


def splits(network: PreTrainedModel) -> bool:
    """Whether all that its layers keep are keys and values."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in DynamicCache(config=network.config).layers)


def read_parts(network: PreTrainedModel, parts: list[Prompts]) -> list[Begun]:
    """One pass for each part of the prompts."""
    return [read(network, part) for part in parts]


def read(network: PreTrainedModel, part: Prompts) -> Begun:
    """A pass over some prompts."""
    cache = DynamicCache(config=network.config)
    hidden = eager_trunk(
        network,
        input_ids=part.tokens,
        attention_mask=part.mask,
        position_ids=part.positions,
        past_key_values=cache,
        use_cache=True,
    )
    return Begun(cache, hidden[:, -1].clone())  # the other tokens' need not stay


def joined(caches: list[Cache]) -> Cache:
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

"""Static KV cache: fixed tensors, so that a GPU can record a decode step once and replay it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from lit_align.models.generation.decode import DecodeState
from lit_align.models.kernels.compile import mark_dynamic, run_trunk_compiled

# The length of the cache is a multiple of this. Attention kernels copy masks of other widths.
CACHE_ALIGNMENT = 64


class StaticKVLayer(StaticLayer):
    """Static cache layer of transformers, with values in the dtype of the keys."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values to the cache.

        Args:
            key_states: [N, key heads, T, D] new keys.
            value_states: [N, key heads, T, D] new values.
            *args: Arguments of transformers.
            **kwargs: Keyword arguments of transformers.

        Returns:
            Keys and values [N, key heads, cache length, D] of all tokens.
        """
        # Under autocast keys are fp32, by the rotary embedding, and values are half precision. The
        # parent class allocates both in one dtype.
        values = value_states.to(key_states.dtype)
        cached: tuple[Tensor, Tensor] = super().update(key_states, values, *args, **kwargs)
        return cached


class StaticDecodeState(DecodeState):
    """Decode state with a static KV cache. It returns the same tokens as `DecodeState`.

    On a GPU the second decode step is recorded as a CUDA graph, and each later step is one launch.
    After finished rows are dropped, the smaller step is recorded again.

    Args:
        prefilled: State after prefill; all layers have full attention.
        max_new_tokens: R, tokens of the longest response.
        uses_compile: Compile the decode step.
    """

    def __init__(self, prefilled: DecodeState, max_new_tokens: int, uses_compile: bool = False):
        self.network, self.head, self.bias = prefilled.network, prefilled.head, prefilled.bias
        self.run_trunk = run_trunk_compiled if uses_compile else prefilled.run_trunk
        self.hidden, self.cache = prefilled.hidden, prefilled.cache
        self.positions = prefilled.positions
        self.num_cached = prefilled.mask.shape[1]  # tokens in the cache
        self.cache_length = (
            -(-(self.num_cached + max_new_tokens) // CACHE_ALIGNMENT) * CACHE_ALIGNMENT
        )
        # transformers uses a mask of four dimensions as it is, so that the graph reads this tensor.
        self.mask = self.hidden.new_full((len(prefilled.mask), 1, 1, self.cache_length), -torch.inf)
        seen = self.mask[:, 0, 0, : self.num_cached]
        seen.masked_fill_(prefilled.mask.bool(), 0)
        self.allocate_static(torch.arange(len(self.mask), device=self.mask.device))

    def allocate_static(self, rows: Tensor) -> None:
        """Copy the given rows of the state to new static tensors.

        Args:
            rows: [n] indices of the rows in the batch.
        """
        cache = Cache(layers=[StaticKVLayer(self.cache_length) for _ in self.cache.layers])
        for number, layer in enumerate(self.cache.layers):
            keys, values = (each[rows, :, : self.num_cached] for each in (layer.keys, layer.values))
            for tensor in cache.update(keys, values, number):
                mark_dynamic(tensor, 0, 2)  # rows and cache length
            # Freed layer by layer, so that only one layer is in memory twice.
            layer.keys = layer.values = keys.new_empty(0)
        self.cache = cache
        self.mask = mark_dynamic(self.mask[rows], 0, 3)
        self.positions = mark_dynamic(self.positions[rows, -1:].clone(), 0)
        self.tokens = mark_dynamic(self.positions.clone(), 0)
        # A recorded graph reads and writes the old tensors.
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False  # True after a step that has chosen and loaded the kernels

    def should_compact(self, num_active: int, num_rows: int) -> bool:
        """Return True if at most half of the rows are still generating, so that others are dropped.

        Args:
            num_active: Rows that are still generating.
            num_rows: Rows in the batch.
        """
        # A lower fraction than in `DecodeState`, because each change records the step again. Keep
        # at least 2 rows: torch.compile specializes size 1.
        return 1 < num_active <= 0.5 * num_rows

    def select_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch.

        Args:
            rows: [n] indices of the rows in the batch, in any order and number.
        """
        self.hidden = self.hidden[rows]
        self.allocate_static(rows)

    def append(self, tokens: Tensor) -> None:
        """Run one decode step.

        Args:
            tokens: [N] token ids, one per row of the batch.
        """
        # In place, because the graph reads these very tensors.
        self.tokens.copy_(tokens.unsqueeze(-1))
        self.positions.add_(1)
        self.mask[..., self.num_cached] = 0
        self.num_cached += 1
        if self.graph is None and self.is_warm and tokens.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records the step without running it
                self.forward(self.tokens)
        if self.graph is None:
            self.forward(self.tokens)
            self.is_warm = True
        else:
            self.graph.replay()

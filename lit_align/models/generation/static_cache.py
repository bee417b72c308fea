"""A decode step that a GPU can record once and replay: fixed places for keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from lit_align.models.generation.decode import DecodeState
from lit_align.models.kernels.compile import mark_dynamic, run_trunk_compiled

CACHE_ALIGNMENT = 64  # tokens: attention's kernels copy masks of other widths


class StaticKVLayer(StaticLayer):
    """transformers' fixed places; under autocast keys are fp32 and values are not."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, once these have been added; as in transformers."""
        values = value_states.to(key_states.dtype)
        cached: tuple[Tensor, Tensor] = super().update(key_states, values, *args, **kwargs)
        return cached


class StaticDecodeState(DecodeState):
    """Says the same as `DecodeState`, from tensors that stay where they are.

    On a GPU the second step of a batch is recorded as a CUDA graph, and each later one is a single
    launch. Rows leave the batch as in `DecodeState`; what remains is recorded anew.

    Args:
        prefilled: A context that has read its prompts; all layers have full attention.
        max_new_tokens: R, tokens of the longest answer.
        uses_compile: Whether a step is compiled.
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
        self.mask = self.hidden.new_full((len(prefilled.mask), 1, 1, self.cache_length), -torch.inf)
        seen = self.mask[:, 0, 0, : self.num_cached]
        seen.masked_fill_(prefilled.mask.bool(), 0)
        self.allocate_static(torch.arange(len(self.mask), device=self.mask.device))

    def allocate_static(self, rows: Tensor) -> None:
        """Moves the rows at [n] places of the batch to tensors of their own."""
        cache = Cache(layers=[StaticKVLayer(self.cache_length) for _ in self.cache.layers])
        for number, layer in enumerate(self.cache.layers):
            keys, values = (each[rows, :, : self.num_cached] for each in (layer.keys, layer.values))
            for tensor in cache.update(keys, values, number):
                mark_dynamic(tensor, 0, 2)
            layer.keys = layer.values = keys.new_empty(0)  # one layer at a time is there twice
        self.cache = cache
        self.mask = mark_dynamic(self.mask[rows], 0, 3)
        self.positions = mark_dynamic(self.positions[rows, -1:].clone(), 0)
        self.tokens = mark_dynamic(self.positions.clone(), 0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False  # whether a step was made whose kernels can now be recorded

    def should_compact(self, num_active: int, num_rows: int) -> bool:
        """Whether it pays to record a smaller step; one for a single row is compiled anew."""
        return 1 < num_active <= 0.5 * num_rows

    def select_rows(self, rows: Tensor) -> None:
        """The rows at [n] places of the batch, each as often as it is named."""
        self.hidden = self.hidden[rows]
        self.allocate_static(rows)

    def append(self, tokens: Tensor) -> None:
        """Goes on with [N] token ids."""
        self.tokens.copy_(tokens.unsqueeze(-1))
        self.positions.add_(1)
        self.mask[..., self.num_cached] = 0
        self.num_cached += 1
        if self.graph is None and self.is_warm and tokens.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # runs nothing
                self.forward(self.tokens)
        if self.graph is None:
            self.forward(self.tokens)
            self.is_warm = True
        else:
            self.graph.replay()

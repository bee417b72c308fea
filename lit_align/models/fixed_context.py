"""A decode step that a GPU can record once and replay: fixed places for keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StaticCache

from lit_align.models.decoding import Context


class FixedContext(Context):
    """Says the same as `Context`, from tensors that stay where they are.

    On a GPU the second step of a batch is recorded as a CUDA graph, and each later one is a single
    launch. Rows leave the batch as in `Context`; what remains is recorded anew.

    Args:
        begun: A context that has read its prompts; all layers have full attention.
        room: R, tokens of the longest answer.
    """

    crowded = 0.5  # to record anew costs more than to copy

    def __init__(self, begun: Context, room: int):
        self.network, self.head, self.bias = begun.network, begun.head, begun.bias
        self.hidden, self.cache = begun.hidden, begun.cache
        self.mask, self.positions = begun.mask, begun.positions
        self.filled = self.mask.shape[1]  # tokens in the cache
        self.size = self.filled + room
        self.fix(torch.arange(len(self.mask), device=self.mask.device))

    def fix(self, rows: Tensor) -> None:
        """Moves the rows at [n] places of the batch to tensors of their own."""
        cache = StaticCache(config=self.network.config, max_cache_len=self.size)
        for number, layer in enumerate(self.cache.layers):
            keys, values = (each[rows, :, : self.filled] for each in (layer.keys, layer.values))
            cache.update(keys, values, number)
        self.cache = cache
        mask = self.mask.new_zeros(len(rows), self.size)
        mask[:, : self.filled] = self.mask[rows, : self.filled]
        self.mask, self.positions = mask, self.positions[rows, -1:].clone()
        self.tokens = self.positions.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # whether a step was made whose kernels can now be recorded

    def keep(self, rows: Tensor) -> None:
        """The rows at [n] places of the batch, each as often as it is named."""
        self.hidden = self.hidden[rows]
        self.fix(rows)

    def append(self, tokens: Tensor) -> None:
        """Goes on with [N] token ids."""
        self.tokens.copy_(tokens.unsqueeze(-1))
        self.positions.add_(1)
        self.mask[:, self.filled] = 1
        self.filled += 1
        if self.graph is None and self.warm and tokens.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # runs nothing
                self.read(self.tokens)
        if self.graph is None:
            self.read(self.tokens)
            self.warm = True
        else:
            self.graph.replay()

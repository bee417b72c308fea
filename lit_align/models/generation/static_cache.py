"""A decode step that a GPU can record once and replay: fixed places for keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from lit_align.models.generation.decode import Context
from lit_align.models.kernels.compile import compiled_trunk, of_any_size

ALIGNED = 64  # tokens: attention's kernels copy masks of other widths


class FixedLayer(StaticLayer):
    """transformers' fixed places; under autocast keys are fp32 and values are not."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, once these have been added; as in transformers."""
        values = value_states.to(key_states.dtype)
        found: tuple[Tensor, Tensor] = super().update(key_states, values, *args, **kwargs)
        return found


class FixedContext(Context):
    """Says the same as `Context`, from tensors that stay where they are.

    On a GPU the second step of a batch is recorded as a CUDA graph, and each later one is a single
    launch. Rows leave the batch as in `Context`; what remains is recorded anew.

    Args:
        begun: A context that has read its prompts; all layers have full attention.
        room: R, tokens of the longest answer.
        compiles: Whether a step is compiled.
    """

    def __init__(self, begun: Context, room: int, compiles: bool = False):
        self.network, self.head, self.bias = begun.network, begun.head, begun.bias
        self.trunk = compiled_trunk if compiles else begun.trunk
        self.hidden, self.cache = begun.hidden, begun.cache
        self.positions = begun.positions
        self.filled = begun.mask.shape[1]  # tokens in the cache
        self.size = -(-(self.filled + room) // ALIGNED) * ALIGNED
        self.mask = self.hidden.new_full((len(begun.mask), 1, 1, self.size), -torch.inf)
        seen = self.mask[:, 0, 0, : self.filled]
        seen.masked_fill_(begun.mask.bool(), 0)
        self.fix(torch.arange(len(self.mask), device=self.mask.device))

    def fix(self, rows: Tensor) -> None:
        """Moves the rows at [n] places of the batch to tensors of their own."""
        cache = Cache(layers=[FixedLayer(self.size) for _ in self.cache.layers])
        for number, layer in enumerate(self.cache.layers):
            keys, values = (each[rows, :, : self.filled] for each in (layer.keys, layer.values))
            for tensor in cache.update(keys, values, number):
                of_any_size(tensor, 0, 2)
            layer.keys = layer.values = keys.new_empty(0)  # one layer at a time is there twice
        self.cache = cache
        self.mask = of_any_size(self.mask[rows], 0, 3)
        self.positions = of_any_size(self.positions[rows, -1:].clone(), 0)
        self.tokens = of_any_size(self.positions.clone(), 0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # whether a step was made whose kernels can now be recorded

    def crowds(self, speaking: int, rows: int) -> bool:
        """Whether it pays to record a smaller step; one for a single row is compiled anew."""
        return 1 < speaking <= 0.5 * rows

    def keep(self, rows: Tensor) -> None:
        """The rows at [n] places of the batch, each as often as it is named."""
        self.hidden = self.hidden[rows]
        self.fix(rows)

    def append(self, tokens: Tensor) -> None:
        """Goes on with [N] token ids."""
        self.tokens.copy_(tokens.unsqueeze(-1))
        self.positions.add_(1)
        self.mask[..., self.filled] = 0
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

"""Frozen weights of 8 or 4 bits, beneath adapters that train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QuantizedParts = tuple[Tensor, ...]
Dequantize = Callable[[QuantizedParts, torch.dtype], Tensor]


class Quantization(ABC):
    """How the linear layers of the blocks are coded; embeddings, norms and heads stay as they are.

    A layer decodes its weight for one product at a time and keeps nothing dense between them.
    Everything that shares the base - reference, reward, critic - is of the coded weights, too.
    """

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedParts:
        """What stands for a weight: codes of 8 bits, then scales, codes too or float32.

        None is 0-dimensional.

        Args:
            weight: [out, in].
        """

    @abstractmethod
    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """The numbers of a weight, row by row, in any shape.

        Args:
            parts: As `quantize` made them.
            dtype: Of the result.
        """

    def replace_linears(self, blocks: Sequence[nn.Module]) -> None:
        """Codes the linear layers of the blocks, in place.

        Args:
            blocks: Transformer blocks; their other weights are frozen by the adapter to come.
        """
        for block in blocks:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    block.set_submodule(name, QuantizedLinear(layer, self))


class QuantizedLinear(nn.Linear):
    """A frozen linear layer; `weight` holds the codes, `scales` what they are relative to.

    Floats among the scales are kept as their bytes: where a network is cast to half precision, or
    its shards are gathered in it, they would be rounded, and the base would be another.

    Args:
        layer: Gives weight and bias.
        scheme: Codes and decodes.
    """

    def __init__(self, layer: nn.Linear, scheme: Quantization):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        codes, *scales = scheme.quantize(layer.weight.detach())
        self.scheme, self.bias = scheme, layer.bias
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.is_float = [scale.is_floating_point() for scale in (codes, *scales)]
        stored = [view_as_bytes(scale) if scale.is_floating_point() else scale for scale in scales]
        self.scales = nn.ParameterList(nn.Parameter(scale, requires_grad=False) for scale in stored)

    def forward(self, inputs: Tensor) -> Tensor:
        """[.., in] -> [.., out], in the inputs' dtype or autocast's."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        outputs: Tensor = _DequantizedLinear.apply(
            inputs, self.dequantize, self.weight, *self.scales
        )
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """[out, in] the weight that the kept parts stand for."""
        parts = tuple(
            part.view(torch.float32).squeeze(-1) if part_is_float else part
            for part, part_is_float in zip(parts, self.is_float, strict=True)
        )
        return self.scheme.dequantize(parts, dtype).view(self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """[out, in] float32: what the layer multiplies by."""
        return self.dequantize((self.weight, *self.scales), torch.float32)

    def to_linear(self) -> nn.Linear:
        """A float32 layer that multiplies by the same."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.dense()), self.bias
        return layer


def view_as_bytes(numbers: Tensor) -> Tensor:
    """[.., 4] uint8: float32 numbers [..], sharing their memory."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


class _AutogradContext(Protocol):
    """The thread from the forward to the backward pass."""

    dequantize: Dequantize
    saved_tensors: QuantizedParts

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _DequantizedLinear(torch.autograd.Function):
    """x W^T; keeps the parts of W alone, and decodes them once more in backward."""

    @staticmethod
    def forward(
        ctx: _AutogradContext, inputs: Tensor, dequantize: Dequantize, *parts: Tensor
    ) -> Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*parts)
        return nn.functional.linear(inputs, dequantize(parts, inputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: _AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return grad @ ctx.dequantize(parts, grad.dtype), None, *(None for _ in parts)

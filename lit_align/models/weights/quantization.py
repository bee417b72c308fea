"""Quantization: frozen base weights in 8 or 4 bits, for training with adapters."""

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
    """Base class of quantization schemes for the linear layers of the blocks.

    Embeddings, norms and heads are not quantized. A layer dequantizes its weight for one product at
    a time and does not keep it. All roles that share the base (reference, reward, critic) use the
    quantized weights.
    """

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedParts:
        """Return the parts of a quantized weight: 8-bit codes, then scales.

        Scales are 8-bit codes or float32. All parts have at least one dimension, because FSDP2
        shards along the first one.

        Args:
            weight: [out, in].
        """

    @abstractmethod
    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """Return the out * in numbers of a weight in row-major order, in any shape.

        Args:
            parts: Result of `quantize`.
            dtype: Data type of the result.
        """

    def replace_linears(self, blocks: Sequence[nn.Module]) -> None:
        """Quantize the linear layers of the blocks in place.

        Args:
            blocks: Transformer blocks. Adding an adapter freezes their other weights later.
        """
        for block in blocks:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    block.set_submodule(name, QuantizedLinear(layer, self))


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with quantized codes in `weight` and the other parts in `scales`.

    Float scales are stored as bytes. A cast of the network to half precision, or gathering in half
    precision, would round them and change the base.

    Args:
        layer: Layer with the weight [out, in] and bias to use.
        scheme: Scheme that quantizes and dequantizes.
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
        """Return the outputs [.., out], in the inputs' dtype or autocast's.

        Args:
            inputs: [.., in].
        """
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        outputs: Tensor = _DequantizedLinear.apply(
            inputs, self.dequantize, self.weight, *self.scales
        )
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """Return the dense weight [out, in] of the stored parts.

        Args:
            parts: Codes and scales, with float scales as bytes.
            dtype: Data type of the result.
        """
        parts = tuple(
            part.view(torch.float32).squeeze(-1) if part_is_float else part
            for part, part_is_float in zip(parts, self.is_float, strict=True)
        )
        return self.scheme.dequantize(parts, dtype).view(self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """Return the dense weight [out, in] in float32."""
        return self.dequantize((self.weight, *self.scales), torch.float32)

    def to_linear(self) -> nn.Linear:
        """Return a plain float32 layer with the dequantized weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.dense()), self.bias
        return layer


def view_as_bytes(numbers: Tensor) -> Tensor:
    """Return float32 numbers [..] as bytes [.., 4] uint8, without copying contiguous ones.

    Args:
        numbers: [..] float32.

    Example:
        >>> view_as_bytes(torch.tensor([0.0, 1.0])).tolist()
        [[0, 0, 0, 0], [0, 0, 128, 63]]
    """
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


class _AutogradContext(Protocol):
    """Context that autograd passes from forward to backward."""

    dequantize: Dequantize
    saved_tensors: QuantizedParts

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _DequantizedLinear(torch.autograd.Function):
    """x W^T that saves only the quantized parts of W and dequantizes them again in backward."""

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

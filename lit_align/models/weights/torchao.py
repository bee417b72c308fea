"""Quantization schemes that use torchao. Install it with pip install lit-align[quant]."""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.models.weights.quantization import Quantization, QuantizedParts

NF4_BLOCK_SIZE = 64  # weights per scale
MAX_SCALES_PER_FACTOR = 256  # scales per float32 factor, at most


class TorchaoWeights(Quantization):
    """Base class of schemes that quantize by torchao. Dequantizing does not need it."""

    def __init__(self) -> None:
        if find_spec("torchao") is None:
            name = type(self).__name__
            raise UserError(f"{name} requires torchao. Run pip install 'torchao>=0.18'.")


class Int8Weights(TorchaoWeights):
    """8 bits per weight and one float32 scale per row: out * in + 4 out bytes for [out, in].

    The rounding error of a weight is at most 1/255 of the largest one in its row.
    """

    def quantize(self, weight: Tensor) -> QuantizedParts:
        """Return codes [out, in] int8 and scales [out, 1] float32.

        Args:
            weight: [out, in].
        """
        torchao = import_module("torchao.quantization")
        quantized = torchao.Int8Tensor.from_hp(weight.float(), torchao.PerRow())
        return quantized.qdata, quantized.scale

    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in], the codes times the scales of their rows.

        Args:
            parts: Result of `quantize`.
            dtype: Data type of the result.
        """
        codes, scale = parts
        return (codes.float() * scale).to(dtype)


class NF4Weights(TorchaoWeights):
    """4 bits per weight: NormalFloat with double quantization, as in QLoRA (arXiv:2305.14314).

    64 weights share an 8-bit scale, and s = gcd(n / 64, 256) scales share a float32 factor, where
    n = out * in. A weight takes n/2 + n/64 + n/(16 s) + 68 bytes. The last 68 are the mean of the
    scales and the table of 16 numbers.
    """

    def quantize(self, weight: Tensor) -> QuantizedParts:
        """Return codes [n/2] uint8, scales [n/64] int8, factors [n/64/s], mean [1] and table [16].

        Args:
            weight: [out, in], n = out * in.
        """
        if weight.numel() % NF4_BLOCK_SIZE:
            raise UserError(
                f"NF4Weights quantizes blocks of {NF4_BLOCK_SIZE} weights, and {NF4_BLOCK_SIZE} "
                f"does not divide a layer of {tuple(weight.shape)}. Use Int8Weights."
            )
        torchao = import_module("torchao.quantization")
        shared = math.gcd(weight.numel() // NF4_BLOCK_SIZE, MAX_SCALES_PER_FACTOR)
        quantized = torchao.to_nf4(weight.float().contiguous(), NF4_BLOCK_SIZE, shared)
        # if all scales of a group equal the mean, torchao divides 0 by 0 (torchao 0.18); the right
        # codes are 0 then
        factor = quantized.quantization_factor.nan_to_num(posinf=1.0)
        same = quantized.quantization_factor.isinf().repeat_interleave(shared)
        scales = quantized.quantized_scalers.where(~same, 0)
        return (
            quantized.quantized_data,
            scales,
            factor,
            quantized.scaler_mean.view(1),
            quantized.nf4,
        )

    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """Return the weight as [n / 64, 64], table entries times the scales of their blocks.

        Args:
            parts: Result of `quantize`.
            dtype: Data type of the result.
        """
        codes, scales, factor, mean, table = parts
        both = torch.stack([codes >> 4, codes & 15], -1)  # the first weight in the high bits
        numbers = table[both.view(-1, NF4_BLOCK_SIZE).int()]
        size = (scales.view(len(factor), -1) / factor.unsqueeze(-1)).view(-1, 1) + mean
        return (numbers * size).to(dtype)

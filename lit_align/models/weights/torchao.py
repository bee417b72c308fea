"""Codes of frozen weights from torchao, which is installed apart: pip install lit-align[quant]."""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.models.weights.quantization import Quantization, QuantizedParts

NF4_BLOCK_SIZE = 64  # weights that share a scale of NF4
MAX_SCALES_PER_FACTOR = 256  # scales of NF4 that share a scale of their own, at most


class TorchaoWeights(Quantization):
    """A quantization whose codes torchao makes; they are decoded without it."""

    def __init__(self) -> None:
        if find_spec("torchao") is None:
            name = type(self).__name__
            raise UserError(f"{name} codes weights through torchao: pip install 'torchao>=0.18'")


class Int8Weights(TorchaoWeights):
    """8 bits a weight and a float32 scale per row: out x in + 4 out bytes for [out, in].

    A weight is off by at most half a step, 1/255 of the largest one in its row.
    """

    def quantize(self, weight: Tensor) -> QuantizedParts:
        """Codes [out, in] int8 and scales [out, 1].

        Args:
            weight: [out, in].
        """
        torchao = import_module("torchao.quantization")
        quantized = torchao.Int8Tensor.from_hp(weight.float(), torchao.PerRow())
        return quantized.qdata, quantized.scale

    def dequantize(self, parts: QuantizedParts, dtype: torch.dtype) -> Tensor:
        """[out, in] the codes times their rows' scales.

        Args:
            parts: As `quantize` made them.
            dtype: Of the result.
        """
        codes, scale = parts
        return (codes.float() * scale).to(dtype)


class NF4Weights(TorchaoWeights):
    """4 bits a weight, the NormalFloat of QLoRA with double quantization (arXiv:2305.14314).

    64 weights share a scale of 8 bits, and s = gcd(out x in / 64, 256) scales a float32: of
    n = out x in weights there remain n/2 + n/64 + n/(16 s) + 68 bytes, the last ones for the mean
    scale and for what the 16 codes stand for.
    """

    def quantize(self, weight: Tensor) -> QuantizedParts:
        """Codes [n/2] uint8, scales [n/64] int8, factors [n/64/s], mean [1] and the 16 numbers.

        Args:
            weight: [out, in].
        """
        if weight.numel() % NF4_BLOCK_SIZE:
            raise UserError(
                f"NF4Weights codes {NF4_BLOCK_SIZE} weights at a time, and a layer of "
                f"{tuple(weight.shape)} "
                f"does not divide into them: take Int8Weights."
            )
        torchao = import_module("torchao.quantization")
        shared = math.gcd(weight.numel() // NF4_BLOCK_SIZE, MAX_SCALES_PER_FACTOR)
        quantized = torchao.to_nf4(weight.float().contiguous(), NF4_BLOCK_SIZE, shared)
        # where all scales of a group are the mean, torchao divides 0 by 0: none is off by anything
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
        """[n / 64, 64] the numbers that codes stand for times their blocks' scales.

        Args:
            parts: As `quantize` made them.
            dtype: Of the result.
        """
        codes, scales, factor, mean, table = parts
        both = torch.stack([codes >> 4, codes & 15], -1)  # two weights to a byte, the first on top
        numbers = table[both.view(-1, NF4_BLOCK_SIZE).int()]
        size = (scales.view(len(factor), -1) / factor.unsqueeze(-1)).view(-1, 1) + mean
        return (numbers * size).to(dtype)

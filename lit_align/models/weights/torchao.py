"""Codes of frozen weights from torchao, which is installed apart: pip install lit-align[quant]."""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lit_align.models.weights.quantization import Parts, Quantisation

BLOCK = 64  # weights that share a scale of NF4
SCALES = 256  # scales of NF4 that share a scale of their own, at most


class TorchaoWeights(Quantisation):
    """A quantisation whose codes torchao makes; they are decoded without it."""

    def __init__(self) -> None:
        if find_spec("torchao") is None:
            name = type(self).__name__
            raise ValueError(f"{name} codes weights through torchao: pip install 'torchao>=0.18'")


class Int8Weights(TorchaoWeights):
    """8 bits a weight and a float32 scale per row: out x in + 4 out bytes for [out, in].

    A weight is off by at most half a step, 1/255 of the largest one in its row.
    """

    def code(self, weight: Tensor) -> Parts:
        """Codes [out, in] int8 and scales [out, 1].

        Args:
            weight: [out, in].
        """
        torchao = import_module("torchao.quantization")
        coded = torchao.Int8Tensor.from_hp(weight.float(), torchao.PerRow())
        return coded.qdata, coded.scale

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """[out, in] the codes times their rows' scales.

        Args:
            parts: As `code` made them.
            dtype: Of the result.
        """
        codes, scale = parts
        return (codes.float() * scale).to(dtype)


class NF4Weights(TorchaoWeights):
    """4 bits a weight, the NormalFloat of QLoRA with double quantisation (arXiv:2305.14314).

    64 weights share a scale of 8 bits, and s = gcd(out x in / 64, 256) scales a float32: of
    n = out x in weights there remain n/2 + n/64 + n/(16 s) + 68 bytes, the last ones for the mean
    scale and for what the 16 codes stand for.
    """

    def code(self, weight: Tensor) -> Parts:
        """Codes [n/2] uint8, scales [n/64] int8, factors [n/64/s], mean [1] and the 16 numbers.

        Args:
            weight: [out, in].
        """
        if weight.numel() % BLOCK:
            raise ValueError(
                f"NF4Weights codes {BLOCK} weights at a time, and a layer of {tuple(weight.shape)} "
                f"does not divide into them: take Int8Weights."
            )
        torchao = import_module("torchao.quantization")
        shared = math.gcd(weight.numel() // BLOCK, SCALES)
        coded = torchao.to_nf4(weight.float().contiguous(), BLOCK, shared)
        # where all scales of a group are the mean, torchao divides 0 by 0: none is off by anything
        factor = coded.quantization_factor.nan_to_num(posinf=1.0)
        same = coded.quantization_factor.isinf().repeat_interleave(shared)
        scales = coded.quantized_scalers.where(~same, 0)
        return coded.quantized_data, scales, factor, coded.scaler_mean.view(1), coded.nf4

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """[n / 64, 64] the numbers that codes stand for times their blocks' scales.

        Args:
            parts: As `code` made them.
            dtype: Of the result.
        """
        codes, scales, factor, mean, table = parts
        both = torch.stack([codes >> 4, codes & 15], -1)  # two weights to a byte, the first on top
        numbers = table[both.view(-1, BLOCK).int()]
        size = (scales.view(len(factor), -1) / factor.unsqueeze(-1)).view(-1, 1) + mean
        return (numbers * size).to(dtype)

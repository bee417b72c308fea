"""GaLore with moments of 8 bits, through torchao: the paper's smallest optimizer state."""

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from lit_align.optim.galore import GaLore, ParamGroup

QUANT_BLOCK_SIZE = 256  # numbers that share a scale
MIN_QUANTIZED_VALUES = 4096  # numbers of a moment, below which 8 bits save little
FLOAT_CHUNK_SIZE = 2**22  # numbers of a moment that are float32 at a time


class GaLore8bit(GaLore):
    """GaLore whose moments are 8-bit codes in blocks of 256 numbers, arXiv:2110.02861.

    A moment of n numbers takes n + 4 ceil(n / 256) bytes. Moments of fewer than 4,096 numbers, and
    those whose shards do not divide into blocks, keep the type of the weights. With `rank` None it
    is AdamW with 8-bit moments, also for the flat parts of SLTrain. `exp_avg` and `exp_avg_sq` hold
    codes, `exp_avg_scale` and `exp_avg_sq_scale` a scale per block: plain tensors, so that a
    checkpoint is read without torchao.

    Args:
        params: (name, tensor) pairs, as of `model.named_parameters()`, or groups of them.
        lr: Learning rate; of a projected matrix, `scale` times that.
    """

    def __init__(self, params: ParamsT, lr: float, **kwargs: Any):
        if find_spec("torchao") is None:
            raise ValueError("GaLore8bit keeps its moments through torchao: pip install torchao")
        self.torchao = import_module("torchao.optim.quant_utils")
        self.quantization_maps: dict[tuple[bool, torch.device], Tensor] = {}  # by code
        super().__init__(params, lr, **kwargs)

    def init_moments(self, moment_grad: Tensor, state: dict[str, Tensor]) -> None:
        """Adds the moments, zeros, to the state of a parameter."""
        part, shards = local_shard(moment_grad), num_shards(moment_grad)
        # a block that ends with a shard would lie elsewhere for another number of ranks
        is_uneven = shards > 1 and (
            part.numel() % QUANT_BLOCK_SIZE or part.numel() * shards != moment_grad.numel()
        )
        if moment_grad.numel() < MIN_QUANTIZED_VALUES or is_uneven:
            super().init_moments(moment_grad, state)
            return
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(
                moment_grad, dtype=torch.uint8, memory_format=torch.contiguous_format
            )
            scale = part.new_zeros(math.ceil(part.numel() / QUANT_BLOCK_SIZE), dtype=torch.float32)
            if isinstance(moment_grad, DTensor):
                scale = DTensor.from_local(
                    scale, moment_grad.device_mesh, moment_grad.placements, run_check=False
                )
            state[f"{name}_scale"] = scale

    def adam_direction(
        self, moment_grad: Tensor, state: dict[str, Tensor], group: ParamGroup
    ) -> Tensor:
        """Adam's direction M / (sqrt(V) + eps), of the moments before they are coded again."""
        if "exp_avg_scale" not in state:
            return super().adam_direction(moment_grad, state, group)
        change = torch.empty_like(moment_grad, memory_format=torch.contiguous_format)
        pieces = [
            local_shard(tensor).reshape(-1).split(FLOAT_CHUNK_SIZE)
            for tensor in (moment_grad, change)
        ]
        for name in ("exp_avg", "exp_avg_sq"):
            pieces.append(local_shard(state[name]).view(-1).split(FLOAT_CHUNK_SIZE))
            pieces.append(
                local_shard(state[f"{name}_scale"]).split(FLOAT_CHUNK_SIZE // QUANT_BLOCK_SIZE)
            )
        first, second = group["betas"]
        for part, out, codes, scale, square_codes, square_scale in zip(*pieces, strict=True):
            grad = part.float()
            mean = (
                self.dequantize(codes, scale, signed=True).mul_(first).add_(grad, alpha=1 - first)
            )
            square = self.dequantize(square_codes, square_scale, signed=False).mul_(second)
            square.addcmul_(grad, grad, value=1 - second)
            out.copy_(mean / square.sqrt().add_(group["eps"]))
            self.quantize(mean, codes, scale, signed=True)
            self.quantize(square, square_codes, square_scale, signed=False)
        return change

    def dequantize(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        """[n] float32: what codes [n] in blocks of a scale [ceil(n / 256)] stand for."""
        table, blocks = self.quantization_map(signed, codes), pad_to_blocks(codes)
        values: Tensor = self.torchao.dequant_with_qmap(blocks, table, scale)
        return values[: len(codes)]

    def quantize(self, values: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
        """Writes values [n] into codes [n] and a scale per block [ceil(n / 256)]."""
        scaled, largest = self.torchao.scale_tensor(pad_to_blocks(values), QUANT_BLOCK_SIZE)
        coded = self.torchao.quantize_8bit_with_qmap(scaled, self.quantization_map(signed, codes))
        codes.copy_(coded[: len(codes)])
        scale.copy_(largest)

    def quantization_map(self, signed: bool, like: Tensor) -> Tensor:
        """[256] float32: what each code stands for, times its block's scale."""
        place = (signed, like.device)
        if place not in self.quantization_maps:
            values = self.torchao.create_dynamic_map(signed)
            self.quantization_maps[place] = torch.tensor(
                values, dtype=torch.float32, device=like.device
            )
        return self.quantization_maps[place]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state; codes and scales keep their types."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for name, param in zip(names, params, strict=True):  # torch casts to the weights' type
            for key, value in state_dict["state"].get(name, {}).items():
                self.state[param][key] = value.to(self.state[param][key].device)


def pad_to_blocks(tensor: Tensor) -> Tensor:
    """[n] with zeros at the end, so that it divides into blocks."""
    missing = -len(tensor) % QUANT_BLOCK_SIZE
    return nn.functional.pad(tensor, (0, missing)) if missing else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_shards(tensor: Tensor) -> int:
    """Shares into which a tensor is split; 1 for a whole one."""
    if not isinstance(tensor, DTensor):
        return 1
    splits = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in splits if placement.is_shard())

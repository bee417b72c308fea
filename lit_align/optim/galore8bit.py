"""GaLore with 8-bit moments of torchao, the smallest optimizer state of arXiv:2403.03507."""

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
MIN_QUANTIZED_VALUES = 4096  # smaller moments keep the dtype of the weights: 8 bits save little
FLOAT_CHUNK_SIZE = 2**22  # numbers of a moment that are float32 at a time


class GaLore8bit(GaLore):
    """GaLore with moments stored as 8-bit codes in blocks of 256 numbers, arXiv:2110.02861.

    A moment of n numbers takes n + 4 ceil(n / 256) bytes. Moments of fewer than 4,096 numbers keep
    the dtype of the weights, as do moments whose shards do not divide into blocks. With `rank`
    None it is AdamW with 8-bit moments, also for the factors and entries of SLTrain. `exp_avg` and
    `exp_avg_sq` hold codes, `exp_avg_scale` and `exp_avg_sq_scale` one scale per block. All are
    plain tensors, so that reading a checkpoint needs no torchao.

    Args:
        params: (name, tensor) pairs, as from `model.named_parameters()`, or groups of them.
        lr: Learning rate. A projected matrix has `scale` times this rate.
        **kwargs: Other arguments of `GaLore`.
    """

    def __init__(self, params: ParamsT, lr: float, **kwargs: Any):
        if find_spec("torchao") is None:
            raise ValueError("GaLore8bit needs torchao, found none. Run: pip install torchao")
        # torchao.optim.quant_utils has no documented interface; checked with torchao 0.18
        self.torchao = import_module("torchao.optim.quant_utils")
        self.quantization_maps: dict[tuple[bool, torch.device], Tensor] = {}  # by (signed, device)
        super().__init__(params, lr, **kwargs)

    def init_moments(self, moment_grad: Tensor, state: dict[str, Tensor]) -> None:
        """Add moments of zeros to the state of a parameter.

        Args:
            moment_grad: [..] gradient of the parameter, or its projection.
            state: State of the parameter.
        """
        part, shards = local_shard(moment_grad), num_shards(moment_grad)
        # A shard that ends inside a block would move all later blocks, so that the codes could not
        # be loaded by another number of ranks.
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
        """Update the moments M and V [..] and return M / (sqrt(V) + eps) [..].

        The direction is computed before the moments are rounded to codes.
        """
        if "exp_avg_scale" not in state:
            return super().adam_direction(moment_grad, state, group)
        # In chunks, so that no moment is in float32 as a whole.
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
        """Return the numbers [n] float32 of codes [n] and block scales [ceil(n / 256)]."""
        table, blocks = self.quantization_map(signed, codes), pad_to_blocks(codes)
        values: Tensor = self.torchao.dequant_with_qmap(blocks, table, scale)
        return values[: len(codes)]

    def quantize(self, values: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
        """Write values [n] into codes [n] and block scales [ceil(n / 256)] in place."""
        scaled, largest = self.torchao.scale_tensor(pad_to_blocks(values), QUANT_BLOCK_SIZE)
        coded = self.torchao.quantize_8bit_with_qmap(scaled, self.quantization_map(signed, codes))
        codes.copy_(coded[: len(codes)])
        scale.copy_(largest)

    def quantization_map(self, signed: bool, like: Tensor) -> Tensor:
        """Return the number [256] float32 of each code, in units of the scale of its block."""
        place = (signed, like.device)
        if place not in self.quantization_maps:
            values = self.torchao.create_dynamic_map(signed)
            self.quantization_maps[place] = torch.tensor(
                values, dtype=torch.float32, device=like.device
            )
        return self.quantization_maps[place]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; codes and scales keep their dtypes."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        # torch 2.13 casts all states but `step` to the dtype of the weights: restore the saved ones
        for name, param in zip(names, params, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                self.state[param][key] = value.to(self.state[param][key].device)


def pad_to_blocks(tensor: Tensor) -> Tensor:
    """Return a tensor [n] with zeros at the end, so that it divides into blocks of 256.

    Args:
        tensor: [n] numbers.

    Example:
        >>> pad_to_blocks(torch.ones(300)).shape
        torch.Size([512])
    """
    missing = -len(tensor) % QUANT_BLOCK_SIZE
    return nn.functional.pad(tensor, (0, missing)) if missing else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the shard [..] of this rank, which shares the memory of the tensor.

    Args:
        tensor: [..]. An unsharded one is returned unchanged.

    Example:
        >>> local_shard(torch.tensor([7, 8, 9])).tolist()
        [7, 8, 9]
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_shards(tensor: Tensor) -> int:
    """Return the number of shards of a tensor [..], 1 for an unsharded one.

    Args:
        tensor: [..] of any placements. Replicas do not count as shards.

    Example:
        >>> num_shards(torch.ones(6, 2))
        1
    """
    if not isinstance(tensor, DTensor):
        return 1
    splits = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in splits if placement.is_shard())

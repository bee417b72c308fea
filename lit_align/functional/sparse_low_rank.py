"""Products with W = scale B A + S without keeping W (SLTrain, arXiv:2406.02214)."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def sparse_low_rank(
    inputs: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    sparse_value: Tensor,
    sparse_index: Tensor,
    scale: float,
) -> Tensor:
    """[.., out] inputs W^T, in the dtype of `inputs` or autocast's.

    W is put together twice, forward and backward; kept between them are the arguments alone.

    Args:
        inputs: [.., in].
        lora_a: [rank, in].
        lora_b: [out, rank].
        sparse_value: [nnz].
        sparse_index: [nnz] positions in the flattened weight, each once.
        scale: Of the low-rank part.
    """
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        inputs = inputs.to(torch.get_autocast_dtype(kind))
    outputs: Tensor = _SparseLowRank.apply(
        inputs, lora_a, lora_b, sparse_value, sparse_index, scale
    )
    return outputs


def dense_weight(
    lora_a: Tensor, lora_b: Tensor, sparse_value: Tensor, sparse_index: Tensor, scale: float
) -> Tensor:
    """[out, in] W = scale B A + S.

    Args:
        lora_a: [rank, in].
        lora_b: [out, rank].
        sparse_value: [nnz].
        sparse_index: [nnz] positions in the flattened weight, each once.
        scale: Of the low-rank part.
    """
    weight = lora_b @ (scale * lora_a)
    weight.view(-1).index_add_(0, sparse_index, sparse_value.to(weight.dtype))
    return weight


def num_sparse(rows: int, columns: int, density: float) -> int:
    """nnz, how many entries of a weight [rows, columns] the sparse part holds.

    Multiplied in the paper's order: 0.01 x 29 x 100 rounds to 28, and 0.01 x (29 x 100) to 29.
    """
    return int(density * rows * columns)


# An operator of its own, since the number of draws depends on values, which fake tensors lack.
@torch.library.custom_op("lit_align::draw_support", mutates_args=())
def draw_support(values: Tensor, size: int, seed: int | None) -> Tensor:
    """[nnz] distinct positions below `size`, ascending; every set of them is equally likely.

    Drawn on the CPU, so that a seed means the same on every device.

    Args:
        values: [nnz], what will stand there.
        size: Entries of the weight.
        seed: Below 2^63; None draws from torch's own generator.
    """
    generator, num_values = torch.default_generator, len(values)
    if seed is not None:
        generator = torch.Generator("cpu").manual_seed(seed)
    num_draws = min(num_values, size - num_values)  # the positions taken, or else those left out
    positions = torch.empty(0, dtype=torch.long, device="cpu")
    while len(positions) < num_draws:
        more = torch.randint(size, (num_draws - len(positions),), generator=generator, device="cpu")
        positions = torch.cat([positions, more]).unique()
    if num_draws < num_values:
        taken = torch.ones(size, dtype=torch.bool, device="cpu")
        taken[positions] = False
        positions = taken.nonzero().squeeze(-1)
    return positions.to(values.device, _index_dtype(size))


@draw_support.register_fake
def _(values: Tensor, size: int, seed: int | None) -> Tensor:
    return values.new_empty(values.shape, dtype=_index_dtype(size))


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


class _AutogradContext(Protocol):
    """The thread from the forward to the backward pass."""

    scale: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SparseLowRank(torch.autograd.Function):
    """x W^T; keeps x and the parts of W, and puts W together once more in backward."""

    @staticmethod
    def forward(
        ctx: _AutogradContext,
        inputs: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        sparse_value: Tensor,
        sparse_index: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(inputs, lora_a, lora_b, sparse_value, sparse_index)
        ctx.scale = scale
        a, b = lora_a.to(inputs.dtype), lora_b.to(inputs.dtype)
        return nn.functional.linear(inputs, dense_weight(a, b, sparse_value, sparse_index, scale))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _AutogradContext, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        inputs, lora_a, lora_b, sparse_value, sparse_index = ctx.saved_tensors
        a, b, scale = lora_a.to(inputs.dtype), lora_b.to(inputs.dtype), ctx.scale
        needs_inputs, *needs_parts = ctx.needs_input_grad[:4]
        grad_inputs = None
        if needs_inputs:
            grad_inputs = grad @ dense_weight(a, b, sparse_value, sparse_index, scale)
        if not any(needs_parts):
            return grad_inputs, None, None, None, None, None
        rows, grads = inputs.reshape(-1, a.shape[1]), grad.reshape(-1, b.shape[0])
        grad_weight = grads.T @ rows  # [out, in]; W has gone by now
        grad_a = (scale * (b.T @ grad_weight)).to(lora_a.dtype)
        grad_b = (grad_weight @ (scale * a).T).to(lora_b.dtype)
        grad_value = grad_weight.view(-1).index_select(0, sparse_index).to(sparse_value.dtype)
        return grad_inputs, grad_a, grad_b, grad_value, None, None

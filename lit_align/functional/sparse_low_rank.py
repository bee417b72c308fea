"""Linear layer with W = scale B A + S (SLTrain, arXiv:2406.02214).

W is built for the product and freed. A and B are low-rank factors, S is sparse with nnz entries.
"""

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
    """Return inputs W^T [.., out], in the dtype of `inputs` or of autocast.

    Forward and backward build W, and only the arguments are saved between them.

    Args:
        inputs: [.., in] input of the layer.
        lora_a: [rank, in] factor A.
        lora_b: [out, rank] factor B.
        sparse_value: [nnz] entries of S.
        sparse_index: [nnz] distinct positions of the entries in the flattened weight.
        scale: Factor on the low-rank part.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> value, index = torch.tensor([5.0]), torch.tensor([1])  # W = [[1, 5], [2, 0]]
        >>> sparse_low_rank(torch.tensor([[1.0, 1.0]]), a, b, value, index, scale=1.0).tolist()
        [[6.0, 2.0]]
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
    """Return W = scale B A + S [out, in].

    Args:
        lora_a: [rank, in] factor A.
        lora_b: [out, rank] factor B.
        sparse_value: [nnz] entries of S.
        sparse_index: [nnz] distinct positions of the entries in the flattened weight.
        scale: Factor on the low-rank part.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]])
        >>> dense_weight(a, b, torch.tensor([7.0]), torch.tensor([3]), scale=2.0).tolist()
        [[2.0, 4.0], [0.0, 7.0]]
    """
    weight = lora_b @ (scale * lora_a)
    weight.view(-1).index_add_(0, sparse_index, sparse_value.to(weight.dtype))
    return weight


def num_sparse(rows: int, columns: int, density: float) -> int:
    """Return nnz, the number of sparse entries of a weight [rows, columns].

    Args:
        rows: Rows of the weight.
        columns: Columns of the weight.
        density: Fraction of the entries that are sparse entries.

    Example:
        >>> num_sparse(200, 50, density=0.03)
        300
    """
    # In the order of the paper: 0.01 x 29 x 100 rounds to 28, but 0.01 x (29 x 100) to 29.
    return int(density * rows * columns)


def _draw_support(values: Tensor, size: int, seed: int | None) -> Tensor:
    """Draw nnz distinct positions below `size`, ascending; every set of them is equally likely.

    The random numbers are made on the CPU, so that a seed means the same on every device.

    Args:
        values: [nnz] entries for the positions. Only their number and device matter.
        size: Number of entries of the weight.
        seed: Seed below 2^63. None draws from the default generator of torch.

    Example:
        >>> draw_support(torch.empty(4), 4, seed=0).tolist()
        [0, 1, 2, 3]
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


# An operator of its own: the number of draws depends on values, which fake tensors do not have.
# `custom_op` wraps a named function, because doctest cannot see examples of an operator.
draw_support = torch.library.custom_op("lit_align::draw_support", _draw_support, mutates_args=())


@draw_support.register_fake
def _(values: Tensor, size: int, seed: int | None) -> Tensor:
    return values.new_empty(values.shape, dtype=_index_dtype(size))


def _index_dtype(size: int) -> torch.dtype:
    """Return the smallest dtype that holds positions below `size`."""
    return torch.int32 if size < 2**31 else torch.int64


class _AutogradContext(Protocol):
    """Type of the `ctx` argument of an autograd function."""

    scale: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SparseLowRank(torch.autograd.Function):
    """The product x W^T, which saves x and the parts of W and builds W again in backward."""

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
        grad_weight = grads.T @ rows  # [out, in]; W is freed, so one dense matrix exists at a time
        grad_a = (scale * (b.T @ grad_weight)).to(lora_a.dtype)
        grad_b = (grad_weight @ (scale * a).T).to(lora_b.dtype)
        grad_value = grad_weight.view(-1).index_select(0, sparse_index).to(sparse_value.dtype)
        return grad_inputs, grad_a, grad_b, grad_value, None, None

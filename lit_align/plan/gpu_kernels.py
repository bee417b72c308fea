"""Memory that fake tensors do not show: inside operators, libraries and allocators.

Shapes: N rows, T query tokens, S key tokens, D head size, H hidden. Checked with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from lit_align.callbacks.memory import MIB
from lit_align.functional import sparse_low_rank

aten = torch.ops.aten
HALF_DTYPES = (torch.bfloat16, torch.float16)
CUBLAS_WORKSPACE = 32 * MIB  # bytes of cuBLAS per thread on Hopper; older GPUs have 8 MiB


def gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace `scaled_dot_product_attention` by the kernel that torch selects on a GPU.

    Args:
        query: [N, heads, T, D].
        key: [N, key heads, S, D].
        value: [N, key heads, S, D].
        attn_mask: Bool, or added to the products; broadcast to [N, heads, T, S].
        dropout_p: Dropout probability.
        is_causal: Use a causal mask.
        scale: Factor of the products. None means 1 / sqrt(D).
        enable_gqa: Let several heads share keys and values.

    Returns:
        Output [N, heads, T, D].
    """
    query, key, value = (cast_for_autocast(x) for x in (query, key, value))
    arguments: tuple[Any, ...] = (query, key, value, attn_mask, dropout_p, is_causal)
    # Plain products: only for heads that share keys, with a mask or in fp32.
    kernel, options = aten._scaled_dot_product_attention_math, {"enable_gqa": enable_gqa}
    # Flash attention takes half precision, no mask, and heads of at most 256.
    if query.dtype in HALF_DTYPES and attn_mask is None and query.shape[-1] <= 256:
        kernel, options = aten._scaled_dot_product_flash_attention, {}
        arguments = (query, key, value, dropout_p, is_causal, False)
    elif query.shape[1] == key.shape[1]:  # the memory-efficient kernel
        kernel, options = aten._scaled_dot_product_efficient_attention, {}
        bias = None if attn_mask is None else additive_mask(attn_mask, query, key)
        trains = torch.is_grad_enabled() and query.requires_grad
        arguments = (query, key, value, bias, trains, dropout_p, is_causal)
    output: Tensor = kernel(*arguments, scale=scale, **options)[0]
    return output


def cast_for_autocast(tensor: Tensor) -> Tensor:
    """Cast a tensor to the dtype of autocast if autocast is on.

    Args:
        tensor: Tensor of any shape.

    Returns:
        Tensor of the same shape.
    """
    # The CPU's autocast, because fake tensors of a plan are on the CPU.
    is_enabled = torch.is_autocast_enabled("cpu")
    return tensor.to(torch.get_autocast_dtype("cpu")) if is_enabled else tensor


def additive_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return an attention mask in the form that is added to the products.

    Args:
        mask: Bool, or added; broadcast to [N, heads, T, S].
        query: [N, heads, T, D].
        key: [N, heads, S, D].

    Returns:
        Mask [N, heads, T, S], 0 or -inf if `mask` is bool.

    Example:
        >>> row = torch.ones(1, 1, 1, 4)
        >>> additive_mask(torch.tensor([[True, False]]), row, torch.ones(1, 1, 2, 4)).tolist()
        [[[[0.0, -inf]]]]
    """
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def gpu_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    """Replace `rms_norm` by the memory of the one kernel that a GPU has for it.

    Args:
        x: [..., H].
        shape: (H,).
        weight: [H], or None.
        eps: Not used, because no value is computed.

    Returns:
        Output [..., H], without values.

    Example:
        >>> gpu_rms_norm(torch.ones(2, 4), (4,), None, 1e-6).shape
        torch.Size([2, 4])
    """
    normed: Tensor = _FusedRMSNorm.apply(x, weight)
    return normed


class _FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input, its weight and one fp32 number per row for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        requested = zip(ctx.saved_tensors[:2], ctx.needs_input_grad, strict=True)
        grad_x, grad_weight = (
            torch.empty_like(each) if is_requested else None for each, is_requested in requested
        )
        return grad_x, grad_weight


def cpu_flash_scratch(query: Tensor, key: Tensor, *others: object) -> int:
    """Return the bytes that flash attention on a CPU allocates inside a forward pass.

    Args:
        query: [N, heads, T, D].
        key: [N, heads, S, D].
        *others: Other arguments of the operator.
    """
    # The block sizes of torch's kernel (FlashAttentionKernel.cpp): each thread has fp32 buffers
    # for products, maximum, sum and output.
    rows, columns = query.shape[-2], key.shape[-2]
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    split, across = min(split, rows), min(512, columns)
    return torch.get_num_threads() * 4 * split * (across + 2 + query.shape[-1])


def draw_support_scratch(values: Tensor, size: int, seed: int) -> int:
    """Return the bytes that `draw_support` allocates in addition to its result.

    Args:
        values: [K] drawn positions.
        size: Number of positions to draw from.
        seed: Not used.

    Example:
        >>> draw_support_scratch(torch.zeros(2), size=10, seed=0)
        72
    """
    # The smaller of the support and its complement is drawn. Sorting keeps several copies of it.
    num_drawn = min(len(values), size - len(values))
    return size + 8 * len(values) if num_drawn < len(values) else 36 * num_drawn


def flash_backward_scratch(grad: Tensor, query: Tensor, key: Tensor, *others: Tensor) -> int:
    """Return the bytes that variable-length flash attention allocates inside a backward pass.

    Args:
        grad: [T, heads, D].
        query: [T, heads, D].
        key: [T, key heads, D].
        *others: Value, output, log-sum-exp, and `cu_seqlens` [n + 1].

    Example:
        >>> one = torch.ones(5, 4, 32)
        >>> flash_backward_scratch(one, one, one, one, one, one, torch.tensor([0, 5]))
        70224
    """
    tokens, heads, width = query.shape
    # fp32 sums of the query's gradient and of one number per row. Each sequence is padded by 128.
    padded = tokens + 128 * (len(others[3]) - 1)
    sums = 4 * padded * heads * (-(-width // 32) * 32 + 1)
    # Gradients of shared keys and values are computed for each head first.
    return sums + (4 * tokens * heads * width if key.shape[1] < heads else 0)


def round_to_cuda_block(size: int) -> int:
    """Return the bytes that torch's CUDA allocator counts for a block.

    Args:
        size: Requested bytes.

    Example:
        >>> round_to_cuda_block(1), round_to_cuda_block(11 * MIB) // MIB
        (512, 12)
    """
    # Large blocks are allocated in multiples of 2 MiB. A rest of at most 1 MiB is not split off,
    # so that it belongs to the block.
    rounded = -(-size // (2 * MIB)) * 2 * MIB
    if size >= 10 * MIB and rounded - size <= MIB:
        return rounded
    return -(-size // 512) * 512


# Scratch bytes by operator, as functions of its arguments. `_opoverload` is private to torch.
CPU_SCRATCH: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: cpu_flash_scratch,
    sparse_low_rank.draw_support._opoverload: draw_support_scratch,
}
GPU_SCRATCH: dict[Any, Callable[..., int]] = {
    varlen._varlen_attn_backward._opoverload: flash_backward_scratch,
}

"""Memory that fake tensors do not show: inside of operators, of libraries, of an allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from lit_align.functional import sparse_low_rank

aten = torch.ops.aten
HALF_DTYPES = (torch.bfloat16, torch.float16)
MIB = 2**20  # bytes
CUBLAS_WORKSPACE = 32 * MIB  # cuBLAS's workspace per thread on Hopper; older cards have 8


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
    """`scaled_dot_product_attention` by the kernel that torch chooses on a GPU.

    Flash attention for halves without a mask, the memory-efficient kernel with one (or in fp32),
    plain products where neither can: groups of heads with a mask.

    Args:
        query: [N, heads, t, d].
        key: [N, groups, s, d].
        value: [N, groups, s, d].
        attn_mask: Bool or added, that broadcasts to [N, heads, t, s].
        dropout_p: As in torch.
        is_causal: As in torch.
        scale: As in torch.
        enable_gqa: Whether heads share keys and values.
    """
    query, key, value = (cast_for_autocast(x) for x in (query, key, value))
    arguments: tuple[Any, ...] = (query, key, value, attn_mask, dropout_p, is_causal)
    kernel, options = aten._scaled_dot_product_attention_math, {"enable_gqa": enable_gqa}
    if query.dtype in HALF_DTYPES and attn_mask is None and query.shape[-1] <= 256:
        kernel, options = aten._scaled_dot_product_flash_attention, {}
        arguments = (query, key, value, dropout_p, is_causal, False)
    elif query.shape[1] == key.shape[1]:
        kernel, options = aten._scaled_dot_product_efficient_attention, {}
        bias = None if attn_mask is None else additive_mask(attn_mask, query, key)
        trains = torch.is_grad_enabled() and query.requires_grad
        arguments = (query, key, value, bias, trains, dropout_p, is_causal)
    output: Tensor = kernel(*arguments, scale=scale, **options)[0]
    return output


def cast_for_autocast(tensor: Tensor) -> Tensor:
    """In the type of autocast, where that is on."""
    is_enabled = torch.is_autocast_enabled("cpu")
    return tensor.to(torch.get_autocast_dtype("cpu")) if is_enabled else tensor


def additive_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[N, heads, t, s] what a mask adds to the products.

    Args:
        mask: Bool or added.
        query: [N, heads, t, d].
        key: [N, heads, s, d].
    """
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def gpu_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` by the one kernel that a GPU has for it.

    Args:
        x: [.., H].
        shape: H.
        weight: [H].
        eps: As in torch.
    """
    normed: Tensor = _FusedRMSNorm.apply(x, weight)
    return normed


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps its input, its weight and one fp32 number of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        requested = zip(ctx.saved_tensors[:2], ctx.needs_input_grad, strict=True)
        of_x, of_weight = (
            torch.empty_like(each) if is_requested else None for each, is_requested in requested
        )
        return of_x, of_weight


def cpu_flash_scratch(query: Tensor, key: Tensor, *others: object) -> int:
    """Bytes that the CPU's flash attention takes inside, forward, per thread."""
    rows, columns = query.shape[-2], key.shape[-2]
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    split, across = min(split, rows), min(512, columns)
    return torch.get_num_threads() * 4 * split * (across + 2 + query.shape[-1])


def draw_support_scratch(values: Tensor, size: int, seed: int) -> int:
    """Bytes that `draw_support` takes beside its result: sorting keeps five copies of a draw."""
    num_drawn = min(len(values), size - len(values))
    return size + 8 * len(values) if num_drawn < len(values) else 36 * num_drawn


def flash_backward_scratch(grad: Tensor, query: Tensor, key: Tensor, *others: Tensor) -> int:
    """Bytes inside the backward of packed flash attention: sums in fp32, keys of all heads.

    Args:
        grad: [T, heads, D].
        query: [T, heads, D].
        key: [T, fewer heads or as many, D].
        *others: value, output, normaliser, and where texts end, [n + 1].
    """
    tokens, heads, width = query.shape
    padded = tokens + 128 * (len(others[3]) - 1)
    sums = 4 * padded * heads * (-(-width // 32) * 32 + 1)
    return sums + (4 * tokens * heads * width if key.shape[1] < heads else 0)


def round_to_cuda_block(size: int) -> int:
    """What a GPU's allocator counts for a block of so many bytes.

    A multiple of 512. From 10 MiB on, memory comes in multiples of 2 MiB, of which a rest of at
    most 1 MiB serves nobody else.
    """
    rounded = -(-size // (2 * MIB)) * 2 * MIB
    if size >= 10 * MIB and rounded - size <= MIB:
        return rounded
    return -(-size // 512) * 512


CPU_SCRATCH: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: cpu_flash_scratch,
    sparse_low_rank.draw_support._opoverload: draw_support_scratch,
}
GPU_SCRATCH: dict[Any, Callable[..., int]] = {
    varlen._varlen_attn_backward._opoverload: flash_backward_scratch,
}

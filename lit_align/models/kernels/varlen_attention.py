"""Attention among texts that stand one behind the other in one row, each seeing itself alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "sdpa_or_packed"  # as transformers knows it


class SequenceLengths:
    """Where the texts of a row end.

    Args:
        lengths: [n] tokens of each text.
        device: Where the row is.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        starts = torch.tensor([0, *lengths], dtype=torch.int32).to(device, non_blocking=True)
        self.cu_seqlens = starts.cumsum(0, dtype=torch.int32)  # [n + 1]

    @property
    def as_attention_mask(self) -> Tensor:
        """[1, 1, 1, n + 1]: of four dimensions, a mask that transformers hands on unread."""
        return self.cu_seqlens.view(1, 1, 1, -1)


def enable_packing(network: PreTrainedModel) -> bool:
    """Puts `sdpa_or_varlen_attention` into a network that is served by it; whether it is.

    That is one whose tokens meet in attention alone, and there see all that stand before them.
    """
    # The underscored attributes are private to transformers; checked with 5.23.
    settings = network.config.to_dict()
    plain = set(settings.get("layer_types") or ["full_attention"]) == {"full_attention"}
    can_pack = (
        network.config._attn_implementation == "sdpa"
        and network._supports_attention_backend
        and not network._is_stateful
        and plain
        and not settings.get("sliding_window")
    )
    if can_pack:
        network.config._attn_implementation = ATTENTION_NAME
    return can_pack


def sdpa_or_varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sequence_lengths: SequenceLengths | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled dot product, or each text of a packed row by itself, without a mask.

    Args:
        module: The layer.
        query: [N, heads, T, D], N = 1 where texts are packed.
        key: [N, fewer heads or as many, T, D].
        value: Of the key's shape.
        mask: Not read where texts are packed.
        sequence_lengths: The texts in the row.
        scaling: Of the products; by default one over the root of D.
        **kwargs: For transformers.

    Returns:
        [N, T, heads, D].
    """
    if sequence_lengths is None and query.shape[2] == 1:
        return next_token_attention(query, key, value, mask, scaling), None
    if sequence_lengths is None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, **kwargs
        )
        return attended, None
    return varlen_attention_eager(module, query, key, value, sequence_lengths, scaling), None


def next_token_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """[N, 1, heads, D] of the last token; heads that share keys are read as if they were tokens.

    So no key is copied for each of them, which is most of what a decode step reads.

    Args:
        query: [N, heads, 1, D].
        key: [N, fewer heads or as many, T, D].
        value: Of the key's shape.
        mask: [N, 1, 1, T], of the scores' dtype or bool.
        scaling: Of the products.
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    attended = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return attended.flatten(1, 2).unsqueeze(1)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: SequenceLengths,
    scaling: float | None,
) -> Tensor:
    """[1, T, heads, D] with each text by itself.

    Args:
        module: The layer.
        query: [1, heads, T, D].
        key: [1, fewer heads or as many, T, D].
        value: Of the key's shape.
        sequence_lengths: The texts in the row.
        scaling: Of the products.
    """
    device_type = query.device.type
    dtype = (
        torch.get_autocast_dtype(device_type)
        if torch.is_autocast_enabled(device_type)
        else query.dtype
    )
    if has_varlen_kernel(device_type) and dtype in (torch.float16, torch.bfloat16):
        return flash_varlen(
            query.to(dtype), key.to(dtype), value.to(dtype), sequence_lengths, scaling
        )
    return attention_by_equal_length(module, query, key, value, sequence_lengths, scaling)


def has_varlen_kernel(device_type: str) -> bool:
    """Whether a kind of device reads packed halves in one launch."""
    return device_type == "cuda"


# Compiled, it would be so anew for each list of lengths.
varlen_attention_eager: Callable[..., Tensor] = torch.compiler.disable(varlen_attention)


def attention_by_equal_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: SequenceLengths,
    scaling: float | None,
) -> Tensor:
    """[1, T, heads, D] by a call for each run of texts that are equally long, on any device.

    Args:
        module: The layer.
        query: [1, heads, T, D].
        key: [1, fewer heads or as many, T, D].
        value: Of the key's shape.
        sequence_lengths: The texts in the row.
        scaling: Of the products.
    """
    runs = [(length, len(list(texts))) for length, texts in groupby(sequence_lengths.lengths)]
    if len(runs) == 1:
        each = (stack_sequences(tensor, *runs[0]) for tensor in (query, key, value))
        alike: Tensor = sdpa_attention_forward(module, *each, None, scaling=scaling)[0]
        return alike.flatten(0, 1).unsqueeze(0)
    sizes = [length * number for length, number in runs]
    split = [each.split(sizes, 2) for each in (query, key, value)]
    parts = []
    for run, *part in zip(runs, *split, strict=True):
        each = (stack_sequences(tensor, *run) for tensor in part)
        parts.append(sdpa_attention_forward(module, *each, None, scaling=scaling)[0].flatten(0, 1))
    return torch.cat(parts).unsqueeze(0)


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: SequenceLengths,
    scaling: float | None,
) -> Tensor:
    """[1, T, heads, D] in one launch, half precision on a GPU.

    Args:
        query: [1, heads, T, D].
        key: [1, fewer heads or as many, T, D].
        value: Of the key's shape.
        sequence_lengths: The texts in the row.
        scaling: Of the products.
    """
    longest = max(sequence_lengths.lengths)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sequence_lengths.cu_seqlens,
        sequence_lengths.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output.unsqueeze(0)


def stack_sequences(part: Tensor, length: int, number: int) -> Tensor:
    """[1, heads, number * length, D] -> [number, heads, length, D]."""
    texts: Tensor = part.squeeze(0).unflatten(1, (number, length))
    return texts.transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, sdpa_or_varlen_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)

"""Attention over packed sequences: each sequence of a row attends to itself only.

Shapes: T tokens of a row, D head size. `key heads` is the number of key heads: equal to the heads,
or smaller (grouped-query attention).
"""

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

ATTENTION_NAME = "sdpa_or_packed"  # registered with transformers under this name


class SequenceLengths:
    """Lengths of the sequences in a packed row, on the host and as `cu_seqlens` on the device.

    Args:
        lengths: Tokens of each of the n sequences.
        device: Device of the row.

    Example:
        >>> SequenceLengths([3, 5, 1], torch.device("cpu")).cu_seqlens.tolist()
        [0, 3, 8, 9]
    """

    def __init__(self, lengths: list[int], device: torch.device):
        # The host keeps the list: `max` of a GPU tensor would make it wait for the device.
        self.lengths = lengths
        starts = torch.tensor([0, *lengths], dtype=torch.int32).to(device, non_blocking=True)
        self.cu_seqlens = starts.cumsum(0, dtype=torch.int32)  # [n + 1]

    @property
    def as_attention_mask(self) -> Tensor:
        """Return `cu_seqlens` as a mask [1, 1, 1, n + 1].

        transformers passes a mask of four dimensions to the attention function unchanged.
        """
        return self.cu_seqlens.view(1, 1, 1, -1)


def enable_packing(network: PreTrainedModel) -> bool:
    """Set `sdpa_or_varlen_attention` as the attention of a network that supports packing.

    A network supports packing if its tokens interact only in attention (no convolution, no
    recurrent state), and if every layer uses full causal sdpa.

    Args:
        network: Network, whose configuration is changed in place.

    Returns:
        True if the network supports packing.
    """
    # The underscored attributes are private to transformers; checked with 5.23.
    settings = network.config.to_dict()
    plain = set(settings.get("layer_types") or ["full_attention"]) == {"full_attention"}
    can_pack = (
        network.config._attn_implementation == "sdpa"
        and network._supports_attention_backend
        and not network._is_stateful  # Mamba and others carry a state from token to token
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
    """Attention function for transformers: sdpa, or variable-length attention of a packed row.

    Args:
        module: Attention layer.
        query: [N, heads, T, D]; N is 1 in a packed row.
        key: [N, key heads, T, D].
        value: [N, key heads, T, D].
        mask: Attention mask; not read in a packed row.
        sequence_lengths: Sequences of a packed row. None means that the rows are not packed.
        scaling: Factor of the products. None means 1 / sqrt(D).
        **kwargs: Other arguments of the attention function in transformers.

    Returns:
        Output [N, T, heads, D], and None in the place of attention weights.
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
    """Attend from the last token, without copying the keys that several heads share.

    Args:
        query: [N, heads, 1, D].
        key: [N, key heads, T, D].
        value: [N, key heads, T, D].
        mask: [N, 1, 1, T], bool, or in the dtype of the query and added to the products.
        scaling: Factor of the products. None means 1 / sqrt(D).

    Returns:
        Output [N, 1, heads, D].

    Example:
        >>> key, value = torch.zeros(1, 1, 2, 4), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> next_token_attention(torch.ones(1, 2, 1, 4), key, value, None, None).flatten().tolist()
        [2.0, 2.0]
    """
    # Heads that share a key become query tokens of one head. Repeated keys would be most of the
    # memory traffic of a decode step.
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
    """Attend within each sequence of a packed row, by the fastest way on this device.

    Args:
        module: Attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        sequence_lengths: Sequences of the row, T tokens together.
        scaling: Factor of the products. None means 1 / sqrt(D).

    Returns:
        Output [1, T, heads, D].

    Example:
        >>> row = torch.ones(1, 2, 5, 4)
        >>> lengths = SequenceLengths([3, 2], row.device)
        >>> varlen_attention(nn.Identity(), row, row, row, lengths, None).shape
        torch.Size([1, 5, 2, 4])
    """
    device_type = query.device.type
    # Autocast casts inside sdpa, but does not know torch's variable-length operator.
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
    """Return True if torch has a half-precision kernel for packed sequences on this device.

    Args:
        device_type: Device type of torch, such as cuda or cpu.
    """
    return device_type == "cuda"


# Not compiled: the lengths are Python numbers, so each list of lengths would be compiled again.
varlen_attention_eager: Callable[..., Tensor] = torch.compiler.disable(varlen_attention)


def attention_by_equal_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: SequenceLengths,
    scaling: float | None,
) -> Tensor:
    """Attend by one sdpa call per run of neighboring sequences of equal length, on any device.

    Args:
        module: Attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        sequence_lengths: Sequences of the row, T tokens together.
        scaling: Factor of the products. None means 1 / sqrt(D).

    Returns:
        Output [1, T, heads, D].

    Example:
        >>> value = torch.tensor([5.0, 7.0]).view(1, 1, 2, 1)
        >>> lengths = SequenceLengths([1, 1], value.device)
        >>> attention_by_equal_length(nn.Identity(), value, value, value, lengths, 1.0).flatten()
        tensor([5., 7.])
    """
    # Micro-batches are sorted by length, so that equal lengths are neighbors.
    runs = [(length, len(list(texts))) for length, texts in groupby(sequence_lengths.lengths)]
    if len(runs) == 1:  # no split and no concatenation, which would copy the row
        each = (stack_sequences(tensor, *runs[0]) for tensor in (query, key, value))
        attended: Tensor = sdpa_attention_forward(module, *each, None, scaling=scaling)[0]
        return attended.flatten(0, 1).unsqueeze(0)
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
    """Attend within each sequence of a packed row by one flash-attention launch on a GPU.

    Args:
        query: [1, heads, T, D], bfloat16 or float16.
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        sequence_lengths: Sequences of the row, T tokens together.
        scaling: Factor of the products. None means 1 / sqrt(D).

    Returns:
        Output [1, T, heads, D].
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
        window_size=(-1, 0),  # causal: all earlier tokens, no later one
        enable_gqa=True,
    )
    assert isinstance(output, Tensor)  # a tuple only with `return_aux`
    return output.unsqueeze(0)


def stack_sequences(part: Tensor, length: int, number: int) -> Tensor:
    """Reshape [1, heads, number * length, D] to [number, heads, length, D], without a copy.

    Args:
        part: Packed sequences of equal length.
        length: Tokens of each sequence.
        number: Number of sequences.

    Example:
        >>> stack_sequences(torch.zeros(1, 2, 6, 4), length=3, number=2).shape
        torch.Size([2, 2, 3, 4])
    """
    texts: Tensor = part.squeeze(0).unflatten(1, (number, length))
    return texts.transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, sdpa_or_varlen_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)

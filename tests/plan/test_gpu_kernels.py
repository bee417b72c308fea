"""Memory of GPU kernels and of the CUDA allocator, by numbers that can be checked by hand."""

import pytest
import torch
from torch.nn.attention import varlen

from lit_align.callbacks.memory import MIB
from lit_align.plan.dispatch_mode import attribute_to
from lit_align.plan.gpu_kernels import (
    CUBLAS_WORKSPACE,
    flash_backward_scratch,
    round_to_cuda_block,
)
from lit_align.plan.memory_tracker import MemoryLocation, MemoryTracker
from lit_align.plan.simulate import Machine, simulation


@pytest.mark.parametrize(
    ("requested", "counted"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (3 * MIB + 1, 3 * MIB + 512),
        (11 * MIB, 12 * MIB),  # a rest of 1 MiB is not split off
        (11 * MIB - 512, 11 * MIB - 512),  # a larger rest is split off
        (12 * MIB, 12 * MIB),
    ],
)
def test_blocks_are_rounded_like_the_cuda_allocator(requested, counted):
    assert round_to_cuda_block(requested) == counted


def test_cublas_workspace_is_counted_once_per_thread():
    """One for forward passes, another for backward, and no workspace on the host."""
    tracker = MemoryTracker()
    with simulation(tracker, Machine()):
        left, right = torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)
        with attribute_to(tracker, None, MemoryLocation.HOST):
            left @ right
        assert tracker.total[MemoryLocation.DEVICE] == 0
        with attribute_to(tracker, None, MemoryLocation.DEVICE):
            product = left @ right + left @ right
            assert CUBLAS_WORKSPACE < tracker.total[MemoryLocation.DEVICE] < 1.01 * CUBLAS_WORKSPACE
            product.sum().backward()
            assert (
                2 * CUBLAS_WORKSPACE
                < tracker.total[MemoryLocation.DEVICE]
                < 2.01 * CUBLAS_WORKSPACE
            )


def test_flash_attention_backward_sums_in_fp32():
    """5 tokens of two texts in 4 heads, and 128 of padding per text; 2 key heads for 4 heads."""
    query, key, ends = torch.ones(5, 4, 32), torch.ones(5, 2, 32), torch.tensor([0, 2, 5])
    rows = 5 + 2 * 128
    sums = 4 * rows * 4 * (32 + 1)
    arguments = (query, key, key, query, query, ends)
    assert flash_backward_scratch(query, *arguments) == sums + 2 * 2 * 5 * 4 * 32
    assert flash_backward_scratch(query, query, query, key, query, query, ends) == sums


def test_flash_attention_backward_has_the_arguments_that_are_counted():
    names = [each.name for each in varlen._varlen_attn_backward._opoverload._schema.arguments]
    assert names[:7] == ["grad_out", "query", "key", "value", "out", "lse", "cu_seq_q"]

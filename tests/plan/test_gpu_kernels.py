"""What a plan knows of a GPU, by numbers that one can check by hand."""

import pytest
import torch
from torch.nn.attention import varlen

from lit_align.plan.dispatch_mode import making
from lit_align.plan.gpu_kernels import KEPT, MIB, counted_on_card, flash_backward
from lit_align.plan.memory_tracker import Ledger, Place
from lit_align.plan.simulate import Machine, world


@pytest.mark.parametrize(
    ("asked", "counted"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (3 * MIB + 1, 3 * MIB + 512),
        (11 * MIB, 12 * MIB),  # the rest of 1 MiB serves nobody
        (11 * MIB - 512, 11 * MIB - 512),  # a larger one is split off
        (12 * MIB, 12 * MIB),
    ],
)
def test_blocks_are_counted_as_a_card_rounds_them(asked, counted):
    assert counted_on_card(asked) == counted


def test_a_thread_that_multiplies_keeps_a_workspace():
    """One of the passes, another of backward; none for products on the host."""
    ledger = Ledger()
    with world(ledger, Machine()):
        left, right = torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)
        with making(ledger, None, Place.HOST):
            left @ right
        assert ledger.total[Place.DEVICE] == 0
        with making(ledger, None, Place.DEVICE):
            product = left @ right + left @ right
            assert KEPT < ledger.total[Place.DEVICE] < 1.01 * KEPT
            product.sum().backward()
            assert 2 * KEPT < ledger.total[Place.DEVICE] < 2.01 * KEPT


def test_flash_attention_sums_in_fp32_inside_of_its_backward():
    """5 tokens of two texts in 4 heads, 128 more of each text; keys of 2 heads are spread to 4."""
    query, key, ends = torch.ones(5, 4, 32), torch.ones(5, 2, 32), torch.tensor([0, 2, 5])
    rows = 5 + 2 * 128
    sums = 4 * rows * 4 * (32 + 1)
    given = (query, key, key, query, query, ends)
    assert flash_backward(query, *given) == sums + 2 * 2 * 5 * 4 * 32
    assert flash_backward(query, query, query, key, query, query, ends) == sums


def test_its_backward_is_given_what_the_count_reads():
    names = [each.name for each in varlen._varlen_attn_backward._opoverload._schema.arguments]
    assert names[:7] == ["grad_out", "query", "key", "value", "out", "lse", "cu_seq_q"]

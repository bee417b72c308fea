"""Exact peak bytes of a pass, so that a change that costs memory is seen.

The figures hold for one torch version on one kind of machine, so they are in the second tier. A
commit that changes one explains it.
"""

import platform
from collections.abc import Callable

import pytest
import torch
from tiny_models import RandomPairs, RandomPrompts, RandomTexts, scalar, tiny
from torch.optim import AdamW

from lit_align.batches import TextBatch
from lit_align.models.generation.decode import SamplingParams
from lit_align.runs.allocations import CPUAllocations

needs_this_torch = pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.__version__.startswith("2.13."),
    reason="the figures were measured with torch 2.13 on x86-64",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: attention allocates scratch memory per thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak bytes of a second call above those in use before it.

    The first call allocates the gradients.
    """
    work()
    allocations = CPUAllocations()
    allocations.start()
    allocations.begin()
    work()
    peak = allocations.end()
    allocations.stop()
    return peak


def text(length: int) -> TextBatch:
    """Return a batch of one text."""
    mask = torch.ones(1, length, dtype=torch.bool)
    ids = torch.arange(3, 3 + length).unsqueeze(0)
    return TextBatch(tokens=ids, token_mask=mask, target_mask=mask, lengths=[length])


@needs_this_torch
@pytest.mark.long
def test_peak_of_a_pass_over_texts():
    policy, batch = tiny(), RandomTexts().batch(0)
    assert peak_bytes(lambda: policy.logprobs(batch).sum().backward()) == 102_368


@needs_this_torch
@pytest.mark.long
def test_peak_of_a_pass_over_pairs():
    network, pairs = scalar(), RandomPairs().batch(0)
    assert peak_bytes(lambda: network.scores(pairs.texts()).sum().backward()) == 221_768


@needs_this_torch
@pytest.mark.long
def test_peak_with_activation_checkpointing():
    policy, batch = tiny(activation_checkpointing=True), RandomTexts().batch(0)
    assert peak_bytes(lambda: policy.logprobs(batch).sum().backward()) == 71_900


@needs_this_torch
@pytest.mark.long
def test_peak_of_a_rollout():
    policy, prompts = tiny(), RandomPrompts().batch(0)
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    given = (prompts, noise, [False] * 4, [], 0, SamplingParams())
    assert peak_bytes(lambda: policy.generate(*given)) == 34_296


@needs_this_torch
@pytest.mark.long
def test_a_fused_adamw_step_allocates_no_copy_of_the_weights():
    policy = tiny()
    adam = AdamW(policy.parameters(), lr=1e-6, fused=True)
    policy.logprobs(RandomTexts().batch(0)).sum().backward()
    assert peak_bytes(adam.step) == 12


def test_blocks_allocate_nothing_for_padding():
    """18 tokens in 4 rows of width 8, or in one row: only tensors outside of blocks are [4, 8]."""
    policy = tiny()
    texts, row = (
        peak_bytes(lambda batch=batch: policy.logprobs(batch).sum().backward())
        for batch in (RandomTexts().batch(0), text(18))
    )
    assert row < texts < 1.04 * row

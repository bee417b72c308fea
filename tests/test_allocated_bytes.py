"""Bytes at the height of a pass, to the byte: what a change costs in memory shows here.

They are of one torch on one kind of machine, as `constraints.txt` has it. Where a number changes,
the commit that changes it says why.
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

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.__version__.startswith("2.13."),
    reason="the numbers are of torch 2.13 on x86-64",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Attention's scratch memory is per thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def height(work: Callable[[], object]) -> int:
    """Bytes above those in use before, the second time that it is done: gradients are there."""
    work()
    allocations = CPUAllocations()
    allocations.start()
    allocations.begin()
    work()
    most = allocations.end()
    allocations.stop()
    return most


def text(length: int) -> TextBatch:
    """One text."""
    mask = torch.ones(1, length, dtype=torch.bool)
    ids = torch.arange(3, 3 + length).unsqueeze(0)
    return TextBatch(tokens=ids, token_mask=mask, target_mask=mask, lengths=[length])


def test_a_pass_over_texts():
    policy, batch = tiny(), RandomTexts().batch(0)
    assert height(lambda: policy.logprobs(batch).sum().backward()) == 102_368


def test_a_pass_over_pairs():
    network, pairs = scalar(), RandomPairs().batch(0)
    assert height(lambda: network.scores(pairs.texts()).sum().backward()) == 221_768


def test_a_pass_that_computes_its_blocks_again():
    policy, batch = tiny(activation_checkpointing=True), RandomTexts().batch(0)
    assert height(lambda: policy.logprobs(batch).sum().backward()) == 71_900


def test_a_rollout():
    policy, prompts = tiny(), RandomPrompts().batch(0)
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    given = (prompts, noise, [False] * 4, [], 0, SamplingParams())
    assert height(lambda: policy.generate(*given)) == 34_296


def test_a_step_of_adam_takes_nothing_of_the_size_of_weights():
    policy = tiny()
    adam = AdamW(policy.parameters(), lr=1e-6, fused=True)
    policy.logprobs(RandomTexts().batch(0)).sum().backward()
    assert height(adam.step) == 12


def test_padding_takes_nothing_where_blocks_are():
    """18 tokens in 4 rows of 8 places, or in one row of 18: places are [4, 8], no block is."""
    policy = tiny()
    texts, row = (
        height(lambda batch=batch: policy.logprobs(batch).sum().backward())
        for batch in (RandomTexts().batch(0), text(18))
    )
    assert row < texts < 1.04 * row

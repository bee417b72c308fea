"""The decode loop reads no more than it must."""

import torch
from torch import nn

from lit_align.batches import Experience
from lit_align.models.decoding import Sampling
from lit_align.models.policy import Policy


class Reading(nn.Module):
    """Counts the rows of every pass through the trunk."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.sizes = trunk, []

    def forward(self, **inputs):
        self.sizes.append(tuple(inputs["input_ids"].shape))
        return self.trunk(**inputs)


def watched(policy: Policy) -> Reading:
    reading = Reading(policy.network.model)
    policy.network.model = reading
    return reading


def respond(policy: Policy, prompts: Experience, stops: list[int], length: int = 6):
    noise = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(5))
    return policy.respond(prompts, noise, [False] * len(prompts), stops, 0, Sampling())


def test_a_prompt_is_read_once_however_many_rows_answer_it(tiny_policy, prompts):
    rows = prompts.rows([0, 0, 1, 1, 1, 3, 0])
    apart = respond(tiny_policy, rows, [2])
    rows.group = [0, 0, 1, 1, 1, 3, 0]
    reading = watched(tiny_policy)
    together = respond(tiny_policy, rows, [2])
    assert reading.sizes[0] == (3, 5)
    assert all(size == (7, 1) for size in reading.sizes[1:])
    assert torch.equal(together.tokens, apart.tokens)
    assert torch.allclose(together.logprobs, apart.logprobs, atol=1e-6)


def test_rows_that_have_stopped_leave_the_batch(tiny_policy, prompts):
    rows = prompts.rows([0, 1, 2, 3] * 8)
    stops = list(range(0, 32, 4))  # a quarter of all tokens
    alone = [alone_of(tiny_policy, rows, row, stops) for row in range(len(rows))]
    reading = watched(tiny_policy)
    together = respond(tiny_policy, rows, stops, 16)
    sizes = [size[0] for size in reading.sizes]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 32
    assert sizes[-1] < 8
    for row, (tokens, logprobs) in enumerate(alone):
        assert torch.equal(together.tokens[row], tokens)
        assert torch.allclose(together.logprobs[row], logprobs, atol=1e-5)


def alone_of(policy: Policy, prompts: Experience, row: int, stops: list[int]):
    """One row answered by itself, with its own noise."""
    noise = torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(5))[[row]]
    said = policy.respond(prompts.rows([row]), noise, [False], stops, 0, Sampling())
    return said.tokens[0], said.logprobs[0]

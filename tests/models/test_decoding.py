"""The decode loop reads no more than it must."""

import torch

from lit_align.batches import Experience
from lit_align.models.decoding import Sampling
from lit_align.models.policy import Policy


def watched(policy: Policy) -> list[tuple[int, ...]]:
    """Notes the rows and tokens of every pass through the trunk."""
    sizes, trunk = [], policy.network.base_model
    forward = trunk.forward

    def counted(**inputs):
        sizes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    trunk.forward = counted
    return sizes


def respond(policy: Policy, prompts: Experience, stops: list[int], length: int = 6):
    noise = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(5))
    return policy.respond(prompts, noise, [False] * len(prompts), stops, 0, Sampling())


def test_a_prompt_is_read_once_however_many_rows_answer_it(tiny_policy, prompts):
    rows = prompts.rows([0, 0, 1, 1, 1, 3, 0])
    apart = respond(tiny_policy, rows, [])
    rows.group = [0, 0, 1, 1, 1, 3, 0]
    sizes = watched(tiny_policy)
    together = respond(tiny_policy, rows, [])
    assert sizes[0] == (3, 5)
    assert all(size == (7, 1) for size in sizes[1:])
    assert torch.equal(together.tokens, apart.tokens)
    assert torch.allclose(together.logprobs, apart.logprobs, atol=1e-6)


def test_rows_that_have_stopped_leave_the_batch(tiny_policy, prompts):
    rows = prompts.rows([0, 1, 2, 3] * 8)
    stops = list(range(0, 32, 4))  # a quarter of all tokens
    alone = [alone_of(tiny_policy, rows, row, stops) for row in range(len(rows))]
    sizes = watched(tiny_policy)
    together = respond(tiny_policy, rows, stops, 16)
    rows_read = [size[0] for size in sizes]
    assert rows_read == sorted(rows_read, reverse=True)
    assert rows_read[0] == 32
    assert rows_read[-1] < 8
    for row, (tokens, logprobs) in enumerate(alone):
        assert torch.equal(together.tokens[row], tokens)
        assert torch.allclose(together.logprobs[row], logprobs, atol=1e-5)


def alone_of(policy: Policy, prompts: Experience, row: int, stops: list[int]):
    """One row answered by itself, with its own noise."""
    noise = torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(5))[[row]]
    said = policy.respond(prompts.rows([row]), noise, [False], stops, 0, Sampling())
    return said.tokens[0], said.logprobs[0]

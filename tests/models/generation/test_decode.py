"""The decode loop reads no more than it must."""

import pytest
import torch
from tiny_models import TINY, tiny

from lit_align.batches import Experience
from lit_align.models.generation.decode import DecodeState, SamplingParams
from lit_align.models.generation.static_cache import StaticDecodeState
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
    return policy.generate(prompts, noise, [False] * len(prompts), stops, 0, SamplingParams())


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


KINDS = {
    "full attention": {},
    "fixed places": {"static_kv_cache": True},
    "a window": {"config": {**TINY, "model_type": "mistral", "sliding_window": 4}},
}


@pytest.mark.parametrize(("at_once", "most"), [(14, 2), (15, 3), (4, 1), (25, 5)])
def test_no_part_has_more_tokens_than_are_read_at_once(monkeypatch, prompts, at_once, most):
    """Of five prompts of five tokens; one is the least."""
    policy = tiny()
    sizes = watched(policy)
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", at_once)
    respond(policy, prompts.rows([0, 1, 2, 3, 0]), [], 2)
    parts = [rows for rows, tokens in sizes if tokens == 5]
    assert (max(parts), sum(parts)) == (most, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_prompts_are_read_in_parts(monkeypatch, prompts, kind):
    rows = prompts.rows([0, 0, 1, 1, 1, 3, 0])
    rows.group = [0, 0, 1, 1, 1, 3, 0]
    policy = tiny(**KINDS[kind])
    at_once = respond(policy, rows, [])
    sizes = watched(policy)
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", 10)
    in_parts = respond(policy, rows, [])
    assert sizes[:2] == [(2, 5), (1, 5)]
    assert all(size == (7, 1) for size in sizes[2:])
    assert torch.equal(in_parts.tokens, at_once.tokens)
    torch.testing.assert_close(in_parts.logprobs, at_once.logprobs, atol=1e-5, rtol=0)


def test_what_is_more_than_keys_and_values_is_read_at_once(monkeypatch, prompts):
    """A state that a layer carries on."""
    layers = ["linear_attention", "full_attention"]
    policy = tiny(config={**TINY, "model_type": "qwen3_next", "layer_types": layers})
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", 10)
    sizes = watched(policy)
    respond(policy, prompts, [])
    assert sizes[0] == (4, 5)


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
    said = policy.generate(prompts.rows([row]), noise, [False], stops, 0, SamplingParams())
    return said.tokens[0], said.logprobs[0]


def test_a_fixed_cache_says_the_same(prompts):
    """Rows leave the batch twice, prompts are shared, half of the rows are greedy."""
    rows = prompts.rows([row for row in range(4) for _ in range(8)])
    rows.group = [row for row in range(4) for _ in range(8)]
    noise = torch.rand(32, 16, generator=torch.Generator().manual_seed(5))
    greedy = [row % 2 == 1 for row in range(32)]
    stops = list(range(0, 32, 4))
    said = [
        tiny(static_kv_cache=fixed).generate(rows, noise, greedy, stops, 0, SamplingParams())
        for fixed in (False, True)
    ]
    assert torch.equal(said[0].tokens, said[1].tokens)
    torch.testing.assert_close(said[0].logprobs, said[1].logprobs, atol=1e-5, rtol=0)
    ends = [len({step for step in row if step}) for row in said[0].tokens.tolist()]
    assert min(ends) < max(ends)


def test_a_fixed_cache_says_the_same_in_mixed_precision(prompts):
    """Keys are fp32 there and values are not."""
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        said = [
            tiny(static_kv_cache=fixed).generate(
                prompts, noise, [False] * 4, [2], 0, SamplingParams()
            )
            for fixed in (False, True)
        ]
    assert torch.equal(said[0].tokens, said[1].tokens)
    torch.testing.assert_close(said[0].logprobs, said[1].logprobs, atol=0.02, rtol=0)


def test_a_fixed_cache_keeps_its_places(tiny_policy, prompts):
    """What a graph reads and writes stays where it was when it was recorded."""
    state = StaticDecodeState(DecodeState(tiny_policy.network, prompts), 3)
    mine = [state.tokens, state.positions, state.mask, state.cache.layers[0].keys]
    places = [tensor.data_ptr() for tensor in mine]
    for _ in range(3):
        state.append(torch.tensor([3, 4, 5, 6]))
    mine = [state.tokens, state.positions, state.mask, state.cache.layers[0].keys]
    assert places == [tensor.data_ptr() for tensor in mine]
    seen = (state.mask == 0).sum(-1).flatten().tolist()
    assert seen == [int(n) + 3 for n in prompts.prompt_mask.sum(-1)]


def test_a_fixed_cache_frees_what_it_has_copied(tiny_policy, prompts):
    """Keys and values are never there twice, but for one layer's."""
    begun = DecodeState(tiny_policy.network, prompts)
    before = [layer.keys for layer in begun.cache.layers]
    old = begun.cache
    fixed = StaticDecodeState(begun, 3)
    assert [layer.keys.numel() for layer in old.layers] == [0] * len(before)
    copied = fixed.cache.layers[0].keys
    assert torch.equal(copied[:, :, : fixed.num_cached - 0], before[0])


def test_a_fixed_cache_is_refused_where_a_layer_looks_back_only_so_far():
    with pytest.raises(ValueError, match="leave out static_kv_cache"):
        tiny(static_kv_cache=True, attn_implementation="eager")

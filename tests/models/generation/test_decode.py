"""The decode loop reads each prompt once, drops finished rows, and caches keys and values."""

import pytest
import torch
from tiny_models import TINY, tiny

from lit_align.batches import Experience
from lit_align.models.generation.decode import DecodeState, SamplingParams
from lit_align.models.generation.static_cache import StaticDecodeState
from lit_align.models.policy import Policy


def record_pass_sizes(policy: Policy) -> list[tuple[int, ...]]:
    """Return a list to which every pass through the trunk adds its rows and tokens."""
    sizes, trunk = [], policy.network.base_model
    forward = trunk.forward

    def recording_forward(**inputs):
        sizes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    trunk.forward = recording_forward
    return sizes


def respond(policy: Policy, prompts: Experience, stops: list[int], length: int = 6):
    """Generate responses of at most `length` tokens from the same noise each time."""
    noise = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(5))
    return policy.generate(prompts, noise, [False] * len(prompts), stops, 0, SamplingParams())


def test_a_shared_prompt_is_read_once(tiny_policy, prompts):
    rows = prompts.rows([0, 0, 1, 1, 1, 3, 0])
    separate = respond(tiny_policy, rows, [])
    rows.group = [0, 0, 1, 1, 1, 3, 0]
    sizes = record_pass_sizes(tiny_policy)
    shared = respond(tiny_policy, rows, [])
    assert sizes[0] == (3, 5)
    assert all(size == (7, 1) for size in sizes[1:])
    assert torch.equal(shared.tokens, separate.tokens)
    assert torch.allclose(shared.logprobs, separate.logprobs, atol=1e-6)


CACHES = {
    "full attention": {},
    "static cache": {"static_kv_cache": True},
    "sliding window": {"config": {**TINY, "model_type": "mistral", "sliding_window": 4}},
}


@pytest.mark.parametrize(("chunk_tokens", "max_rows"), [(14, 2), (15, 3), (4, 1), (25, 5)])
def test_a_prefill_chunk_has_at_most_the_given_tokens(monkeypatch, prompts, chunk_tokens, max_rows):
    """Five prompts of five tokens; a chunk has at least one prompt."""
    policy = tiny()
    sizes = record_pass_sizes(policy)
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", chunk_tokens)
    respond(policy, prompts.rows([0, 1, 2, 3, 0]), [], 2)
    chunk_rows = [rows for rows, tokens in sizes if tokens == 5]
    assert (max(chunk_rows), sum(chunk_rows)) == (max_rows, 5)


@pytest.mark.parametrize("name", CACHES)
def test_prefill_in_chunks_gives_equal_responses(monkeypatch, prompts, name):
    rows = prompts.rows([0, 0, 1, 1, 1, 3, 0])
    rows.group = [0, 0, 1, 1, 1, 3, 0]
    policy = tiny(**CACHES[name])
    expected = respond(policy, rows, [])
    sizes = record_pass_sizes(policy)
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", 10)
    found = respond(policy, rows, [])
    assert sizes[:2] == [(2, 5), (1, 5)]
    assert all(size == (7, 1) for size in sizes[2:])
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_linear_attention_has_one_prefill_chunk(monkeypatch, prompts):
    """Its state cannot be concatenated as keys and values can."""
    layers = ["linear_attention", "full_attention"]
    policy = tiny(config={**TINY, "model_type": "qwen3_next", "layer_types": layers})
    monkeypatch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", 10)
    sizes = record_pass_sizes(policy)
    respond(policy, prompts, [])
    assert sizes[0] == (4, 5)


def test_finished_rows_are_dropped_from_the_batch(tiny_policy, prompts):
    rows = prompts.rows([0, 1, 2, 3] * 8)
    stops = list(range(0, 32, 4))  # a quarter of all tokens
    single = [respond_to_one(tiny_policy, rows, row, stops) for row in range(len(rows))]
    sizes = record_pass_sizes(tiny_policy)
    found = respond(tiny_policy, rows, stops, 16)
    num_rows = [size[0] for size in sizes]
    assert num_rows == sorted(num_rows, reverse=True)
    assert num_rows[0] == 32
    assert num_rows[-1] < 8
    for row, (tokens, logprobs) in enumerate(single):
        assert torch.equal(found.tokens[row], tokens)
        assert torch.allclose(found.logprobs[row], logprobs, atol=1e-5)


def respond_to_one(policy: Policy, prompts: Experience, row: int, stops: list[int]):
    """Generate the response of one row in a batch of one, from the noise that `respond` uses."""
    noise = torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(5))[[row]]
    found = policy.generate(prompts.rows([row]), noise, [False], stops, 0, SamplingParams())
    return found.tokens[0], found.logprobs[0]


def test_static_cache_gives_equal_responses(prompts):
    """Rows are dropped twice, prompts are shared, and half of the rows are greedy."""
    rows = prompts.rows([row for row in range(4) for _ in range(8)])
    rows.group = [row for row in range(4) for _ in range(8)]
    noise = torch.rand(32, 16, generator=torch.Generator().manual_seed(5))
    greedy = [row % 2 == 1 for row in range(32)]
    stops = list(range(0, 32, 4))
    expected, found = (
        tiny(static_kv_cache=is_static).generate(rows, noise, greedy, stops, 0, SamplingParams())
        for is_static in (False, True)
    )
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    ends = [len({step for step in row if step}) for row in expected.tokens.tolist()]
    assert min(ends) < max(ends)


def test_static_cache_gives_equal_responses_in_mixed_precision(prompts):
    """Under autocast keys are fp32 and values are bf16."""
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (
            tiny(static_kv_cache=is_static).generate(
                prompts, noise, [False] * 4, [2], 0, SamplingParams()
            )
            for is_static in (False, True)
        )
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=0.02, rtol=0)


def graph_addresses(state: StaticDecodeState) -> list[int]:
    """Return the addresses of tensors that a recorded graph reads and writes."""
    tensors = [state.tokens, state.positions, state.mask, state.cache.layers[0].keys]
    return [tensor.data_ptr() for tensor in tensors]


def test_decode_steps_keep_the_tensors_of_a_static_cache(tiny_policy, prompts):
    state = StaticDecodeState(DecodeState(tiny_policy.network, prompts), 3)
    before = graph_addresses(state)
    for _ in range(3):
        state.append(torch.tensor([3, 4, 5, 6]))
    assert graph_addresses(state) == before
    seen = (state.mask == 0).sum(-1).flatten().tolist()
    assert seen == [int(n) + 3 for n in prompts.prompt_mask.sum(-1)]


def test_static_cache_frees_the_cache_it_has_copied(tiny_policy, prompts):
    """Only one layer's keys and values are in memory twice."""
    prefilled = DecodeState(tiny_policy.network, prompts)
    before = [layer.keys for layer in prefilled.cache.layers]
    old = prefilled.cache
    static = StaticDecodeState(prefilled, 3)
    assert [layer.keys.numel() for layer in old.layers] == [0] * len(before)
    copied = static.cache.layers[0].keys
    assert torch.equal(copied[:, :, : static.num_cached], before[0])


def test_static_cache_is_refused_for_eager_attention():
    with pytest.raises(ValueError, match="Remove static_kv_cache"):
        tiny(static_kv_cache=True, attn_implementation="eager")

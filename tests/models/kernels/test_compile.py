"""Compiled blocks and decode steps give equal results, from one graph for all lengths."""

from functools import partial

import pytest
import torch
from tiny_models import tiny
from torch import nn
from torch._dynamo.utils import counters

from lit_align.algorithms.grpo import GRPO
from lit_align.batches import Experience, TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.generation import static_cache
from lit_align.models.generation.decode import SamplingParams
from lit_align.models.kernels import compile as compiling
from lit_align.models.kernels.compile import run_trunk
from lit_align.runs.allocations import CPUAllocations

# aot_eager runs the same graphs without generating code; inductor is what users have.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.fixture(params=BACKENDS)
def compiler(request, monkeypatch):
    """Compile with the backend of the parameter."""
    torch._dynamo.reset()
    counters.clear()
    given = {"backend": request.param}

    def compile_module(module: nn.Module, **options):
        module._compiled_call_impl = torch.compile(module._call_impl, **options, **given)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    inside = torch.compile(compiling.call_block, dynamic=True, **given)
    monkeypatch.setattr(compiling, "compiled_call", inside)
    step = torch.compile(run_trunk, fullgraph=True, **given)
    monkeypatch.setattr(static_cache, "run_trunk_compiled", step)
    yield
    torch._dynamo.reset()


def random_texts(lengths: list[int]) -> TextBatch:
    """Return random texts with padding on the right."""
    ids = torch.randint(3, 32, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextBatch(tokens=ids, token_mask=real, target_mask=real.clone(), lengths=lengths)


def logprobs_and_gradients(policy, batch: TextBatch) -> list[torch.Tensor]:
    """Return the log-probs and the gradient of each weight."""
    logprobs = policy.logprobs(batch)
    logprobs.sum().backward()
    found = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
    policy.zero_grad()
    return [logprobs.detach(), *found]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_blocks_give_equal_gradients(compiler, activation_checkpointing):
    batches = [random_texts(lengths) for lengths in ([7, 7, 3], [9], [5, 5, 5, 2], [4, 6])]
    plain, compiled = (
        tiny(compile=is_compiled, activation_checkpointing=activation_checkpointing)
        for is_compiled in (False, True)
    )
    for batch in batches:
        found, expected = (logprobs_and_gradients(each, batch) for each in (compiled, plain))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_a_copied_reference_is_compiled(compiler):
    reference = GRPO(policy=partial(tiny, compile=True)).build()["reference"]
    with torch.no_grad():
        reference.logprobs(random_texts([7, 7, 3]))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_networks_in_eval_mode_are_compiled(compiler, activation_checkpointing):
    """Without backward there is no recomputation, also with activation checkpointing."""
    policy, batch = (
        tiny(compile=True, activation_checkpointing=activation_checkpointing),
        random_texts([7, 7, 3]),
    )
    with torch.no_grad():
        expected = tiny().logprobs(batch)
        torch.testing.assert_close(policy.eval().logprobs(batch), expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.long
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_longer_texts_are_not_compiled_again(compiler, activation_checkpointing):
    policy = tiny(compile=True, activation_checkpointing=activation_checkpointing)
    for lengths in ([7, 7, 3], [9, 2], [5, 5, 4]):
        logprobs_and_gradients(policy, random_texts(lengths))
    before = counters["stats"]["unique_graphs"]
    for lengths in ([11, 7, 3, 3], [12, 2], [5, 5, 8]):
        logprobs_and_gradients(policy, random_texts(lengths))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.long
def test_compiled_checkpoints_keep_only_the_inputs_of_blocks(compiler):
    """Bytes that are in use between forward and backward."""
    in_use = {}
    for activation_checkpointing in (False, True):
        policy, batch = (
            tiny(compile=True, activation_checkpointing=activation_checkpointing),
            random_texts([9] * 8),
        )
        logprobs_and_gradients(policy, batch)  # compiles
        allocations = CPUAllocations()
        allocations.start()
        allocations.begin()
        logprobs = policy.logprobs(batch)
        allocations.end()
        in_use[activation_checkpointing] = allocations.bytes_in_use
        allocations.stop()
        logprobs.sum().backward()
    assert in_use[True] < 0.4 * in_use[False]


@pytest.mark.long
def test_compiled_blocks_follow_a_disabled_adapter(compiler):
    lora = LoRA(4, lora_alpha=8)
    plain, compiled = (tiny(lora=lora, compile=is_compiled) for is_compiled in (False, True))
    compiled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            if one.requires_grad:
                one.normal_(std=0.5)
                other.copy_(one)
    batch = random_texts([7, 7, 3])
    with torch.no_grad():
        for _ in range(2):
            expected, found = plain.logprobs(batch), compiled.logprobs(batch)
            with plain.adapters.disable_all(), compiled.adapters.disable_all():
                expected_base, found_base = plain.logprobs(batch), compiled.logprobs(batch)
            assert (expected - expected_base).abs().max() > 0.01
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(found_base, expected_base, atol=1e-5, rtol=0)
    found, expected = (logprobs_and_gradients(each, batch) for each in (compiled, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_one_compiled_decode_step_serves_all_sizes(compiler):
    """Sizes of rows, some of which are dropped, of prompts and of responses."""
    plain, compiled = tiny(static_kv_cache=True), tiny(static_kv_cache=True, compile=True)
    for rows, width, max_new_tokens in ((8, 10, 16), (16, 10, 16), (16, 70, 12)):
        generator = torch.Generator().manual_seed(rows + width)
        ids = torch.randint(3, 32, (rows, width), generator=generator)
        lengths = [width - row % 3 for row in range(rows)]
        real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        prompts = Experience(prompts=ids, prompt_mask=real, prompt_lengths=lengths)
        noise = torch.rand(rows, max_new_tokens, generator=generator)
        expected, found = (
            policy.generate(prompts, noise, [False] * rows, range(4), 0, SamplingParams())
            for policy in (plain, compiled)
        )
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_growing_cache_uses_no_compiled_blocks(compiler, prompts):
    noise = torch.rand(len(prompts), 6)
    expected, found = (
        tiny(compile=is_compiled).generate(prompts, noise, [False] * 4, [2], 0, SamplingParams())
        for is_compiled in (False, True)
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert counters["stats"]["unique_graphs"] == 0

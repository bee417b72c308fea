"""What is compiled says the same, for texts of any length, and is compiled once for all of them."""

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

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]  # which writes C++


@pytest.fixture(params=BACKENDS)
def compiler(request, monkeypatch):
    """The same graphs from a backend that takes no time, or from the one that users have."""
    torch._dynamo.reset()
    counters.clear()
    given = {"backend": request.param}

    def compile_module(module: nn.Module, **options):
        module._compiled_call_impl = torch.compile(module._call_impl, **options, **given)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    inside = torch.compile(compiling.call_function, dynamic=True, **given)
    monkeypatch.setattr(compiling, "compiled_call", inside)
    step = torch.compile(run_trunk, fullgraph=True, **given)
    monkeypatch.setattr(static_cache, "run_trunk_compiled", step)
    yield
    torch._dynamo.reset()


def texts(lengths: list[int]) -> TextBatch:
    """Random texts, padded behind."""
    ids = torch.randint(3, 32, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextBatch(tokens=ids, token_mask=real, target_mask=real.clone(), lengths=lengths)


def passed(policy, batch: TextBatch) -> list[torch.Tensor]:
    """Log-probs, and the gradient of each weight."""
    logprobs = policy.logprobs(batch)
    logprobs.sum().backward()
    found = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
    policy.zero_grad()
    return [logprobs.detach(), *found]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_blocks_say_the_same(compiler, activation_checkpointing):
    batches = [texts(lengths) for lengths in ([7, 7, 3], [9], [5, 5, 5, 2], [4, 6])]
    plain, compiled = (
        tiny(compile=wanted, activation_checkpointing=activation_checkpointing)
        for wanted in (False, True)
    )
    for batch in batches:
        for mine, other in zip(passed(compiled, batch), passed(plain, batch), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_a_reference_that_is_a_copy_compiles(compiler):
    reference = GRPO(policy=partial(tiny, compile=True)).build()["reference"]
    with torch.no_grad():
        reference.logprobs(texts([7, 7, 3]))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_frozen_networks_compile_too(compiler, activation_checkpointing):
    """They compute nothing again, whatever the strategy says."""
    policy, batch = (
        tiny(compile=True, activation_checkpointing=activation_checkpointing),
        texts([7, 7, 3]),
    )
    with torch.no_grad():
        expected = tiny().logprobs(batch)
        torch.testing.assert_close(policy.eval().logprobs(batch), expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.long
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_longer_texts_are_not_compiled_anew(compiler, activation_checkpointing):
    policy = tiny(compile=True, activation_checkpointing=activation_checkpointing)
    for lengths in ([7, 7, 3], [9, 2], [5, 5, 4]):
        passed(policy, texts(lengths))
    before = counters["stats"]["unique_graphs"]
    for lengths in ([11, 7, 3, 3], [12, 2], [5, 5, 8]):
        passed(policy, texts(lengths))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.long
def test_compiled_blocks_that_are_computed_again_keep_their_inputs_alone(compiler):
    """Bytes that are held between the two passes."""
    held = {}
    for activation_checkpointing in (False, True):
        policy, batch = (
            tiny(compile=True, activation_checkpointing=activation_checkpointing),
            texts([9] * 8),
        )
        passed(policy, batch)
        allocations = CPUAllocations()
        allocations.start()
        allocations.begin()
        logprobs = policy.logprobs(batch)
        allocations.end()
        held[activation_checkpointing] = allocations.bytes_in_use
        allocations.stop()
        logprobs.sum().backward()
    assert held[True] < 0.4 * held[False]


@pytest.mark.long
def test_an_adapter_goes_on_and_off(compiler):
    """With one adapter and without it, the compiled blocks are those of their moment."""
    lora = LoRA(4, lora_alpha=8)
    plain, compiled = (tiny(lora=lora, compile=wanted) for wanted in (False, True))
    compiled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            if one.requires_grad:
                one.normal_(std=0.5)
                other.copy_(one)
    batch = texts([7, 7, 3])
    with torch.no_grad():
        for _ in range(2):
            on, same_on = plain.logprobs(batch), compiled.logprobs(batch)
            with plain.adapters.disabled(), compiled.adapters.disabled():
                off, same_off = plain.logprobs(batch), compiled.logprobs(batch)
            assert (on - off).abs().max() > 0.01
            torch.testing.assert_close(same_on, on, atol=1e-5, rtol=0)
            torch.testing.assert_close(same_off, off, atol=1e-5, rtol=0)
    for mine, other in zip(passed(compiled, batch), passed(plain, batch), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)


def test_a_compiled_step_says_the_same_and_serves_all_sizes(compiler):
    """Of rows, some of which leave the batch, of prompts and of answers."""
    plain, compiled = tiny(static_kv_cache=True), tiny(static_kv_cache=True, compile=True)
    for rows, width, room in ((8, 10, 16), (16, 10, 16), (16, 70, 12)):
        generator = torch.Generator().manual_seed(rows + width)
        ids = torch.randint(3, 32, (rows, width), generator=generator)
        lengths = [width - row % 3 for row in range(rows)]
        real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        prompts = Experience(prompts=ids, prompt_mask=real, prompt_lengths=lengths)
        noise = torch.rand(rows, room, generator=generator)
        said = [
            policy.generate(prompts, noise, [False] * rows, range(4), 0, SamplingParams())
            for policy in (plain, compiled)
        ]
        assert torch.equal(said[0].tokens, said[1].tokens)
        torch.testing.assert_close(said[0].logprobs, said[1].logprobs, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_network_that_compiles_answers_without_a_fixed_cache(compiler, prompts):
    """Its blocks are not compiled for keys and values that grow."""
    noise = torch.rand(len(prompts), 6)
    said = [
        tiny(compile=wanted).generate(prompts, noise, [False] * 4, [2], 0, SamplingParams())
        for wanted in (False, True)
    ]
    assert torch.equal(said[0].tokens, said[1].tokens)
    assert counters["stats"]["unique_graphs"] == 0

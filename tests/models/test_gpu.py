"""Tests that need a GPU: varlen attention in half precision, CUDA graphs, compiled blocks."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY, ragged_rollout
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_align.batches import Experience
from lit_align.models.generation.decode import Responses, SamplingParams
from lit_align.models.generation.static_cache import StaticDecodeState
from lit_align.models.kernels import varlen_attention
from lit_align.models.kernels.rms_norm import RMSNorm
from lit_align.models.policy import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
SIZES = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2}  # supported by its kernels


def on_gpu(heads: int = 2, **settings) -> Policy:
    """Return a policy with the same random weights each time."""
    torch.manual_seed(0)
    config = {**TINY, **SIZES, "num_key_value_heads": heads}
    return Policy(config=config, **settings).to(GPU)


def responses_on_gpu(policy: Policy) -> Responses:
    """Return responses of 32 rows, half of them greedy, which end at different steps."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 32, (32, 9), generator=generator)
    lengths = [9 - row % 4 for row in range(32)]
    real = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    rows = Experience(prompts=ids, prompt_mask=real, prompt_lengths=lengths).to(GPU)
    noise = torch.rand(32, 64, generator=generator).to(GPU)
    return policy.generate(
        rows, noise, [row % 2 == 1 for row in range(32)], [2, 3], 0, SamplingParams()
    )


@pytest.mark.parametrize("heads", [2, 1])
def test_varlen_kernel_equals_attention_by_length(monkeypatch, heads):
    """Log-probs and gradients agree up to bf16 rounding."""
    policy, batch = on_gpu(heads, dtype="bfloat16"), ragged_rollout().to(GPU)
    calls, kernel = [], varlen_attention.flash_varlen
    monkeypatch.setattr(
        varlen_attention, "flash_varlen", lambda *given: calls.append(1) or kernel(*given)
    )

    def logprobs_and_gradient():
        logprobs = policy.logprobs(batch)
        logprobs.sum().backward()
        found = [weight.grad.float() for weight in policy.parameters()]
        policy.zero_grad()
        return logprobs.detach(), torch.cat([grad.flatten() for grad in found])

    logprobs, gradient = logprobs_and_gradient()
    assert len(calls) == 2
    layer = SimpleNamespace(num_key_value_groups=2 // heads)
    monkeypatch.setattr(
        varlen_attention, "flash_varlen", partial(varlen_attention.attention_by_equal_length, layer)
    )
    expected, other = logprobs_and_gradient()
    assert (logprobs - expected).abs().max() < 0.05
    assert (gradient - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_a_recorded_step_generates_equal_responses(monkeypatch, heads, compiles):
    plain = responses_on_gpu(on_gpu(heads, static_kv_cache=False))
    recorded, read = [], StaticDecodeState.forward

    def forward(state, tokens):
        recorded.append(torch.cuda.is_current_stream_capturing())
        read(state, tokens)

    monkeypatch.setattr(StaticDecodeState, "forward", forward)
    found = responses_on_gpu(on_gpu(heads, compile=compiles))  # static_kv_cache is the default here
    assert sum(recorded) > 1  # recorded again when finished rows were dropped
    assert len(recorded) == 2 * sum(recorded)  # one to warm up, one to record; the rest is replayed
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-4, rtol=0)


def test_compiled_blocks_give_equal_logprobs():
    batch = ragged_rollout().to(GPU)
    plain, compiled = (on_gpu(compile=wanted).logprobs(batch) for wanted in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=0)


def test_a_bf16_network_stays_bf16_under_autocast():
    """So does the base of an adapter with precision bf16-mixed."""
    batch = ragged_rollout().to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        assert on_gpu(dtype="bfloat16").hidden_states(batch).dtype is torch.bfloat16


def test_a_norm_saves_only_its_input_and_one_float_per_row():
    """Outputs and gradients in bf16 equal those in fp32 up to rounding."""
    with GPU:
        norm = RMSNorm(LlamaRMSNorm(512), 1e-6)
        torch.nn.init.uniform_(norm.weight)
        x = torch.randn(1000, 512, requires_grad=True)
        half = x.detach().bfloat16().requires_grad_()
    half_norm = deepcopy(norm).bfloat16()
    before = torch.cuda.memory_allocated()
    found = half_norm(half)
    assert torch.cuda.memory_allocated() - before - found.nbytes == 4096  # blocks of 512
    expected = norm(x)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.float().sin().sum().backward()
    expected.sin().sum().backward()
    assert (half.grad - x.grad).norm() < 0.02 * x.grad.norm()
    gradient = half_norm.weight.grad.float()
    assert (gradient - norm.weight.grad).norm() < 0.02 * norm.weight.grad.norm()

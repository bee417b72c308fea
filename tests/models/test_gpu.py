"""What only a GPU can show: the kernel for packed halves, recorded steps, compiled blocks."""

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
SIZES = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2}  # that its kernels know


def on_gpu(heads: int = 2, **settings) -> Policy:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = {**TINY, **SIZES, "num_key_value_heads": heads}
    return Policy(config=config, **settings).to(GPU)


def answers(policy: Policy) -> Responses:
    """Of 32 rows to four prompts, half of them greedy; they end one after the other."""
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
def test_the_kernel_for_packed_halves_says_what_single_texts_say(monkeypatch, heads):
    """And so do its gradients, by rounding of halves."""
    policy, batch = on_gpu(heads, dtype="bfloat16"), ragged_rollout().to(GPU)
    calls, kernel = [], varlen_attention.flash_varlen
    monkeypatch.setattr(
        varlen_attention, "flash_varlen", lambda *given: calls.append(1) or kernel(*given)
    )

    def passed():
        logprobs = policy.logprobs(batch)
        logprobs.sum().backward()
        found = [weight.grad.float() for weight in policy.parameters()]
        policy.zero_grad()
        return logprobs.detach(), torch.cat([grad.flatten() for grad in found])

    logprobs, gradient = passed()
    assert len(calls) == 2
    layer = SimpleNamespace(num_key_value_groups=2 // heads)
    monkeypatch.setattr(
        varlen_attention, "flash_varlen", partial(varlen_attention.attention_by_equal_length, layer)
    )
    expected, other = passed()
    assert (logprobs - expected).abs().max() < 0.05
    assert (gradient - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_a_recorded_step_says_the_same(monkeypatch, heads, compiles):
    plain = answers(on_gpu(heads, static_kv_cache=False))
    recorded, read = [], StaticDecodeState.forward

    def watched(state, tokens):
        recorded.append(torch.cuda.is_current_stream_capturing())
        read(state, tokens)

    monkeypatch.setattr(StaticDecodeState, "forward", watched)
    said = answers(on_gpu(heads, compile=compiles))  # static_kv_cache is the default here
    assert sum(recorded) > 1  # rows have left the batch
    assert len(recorded) == 2 * sum(recorded)  # one to warm up, one to record; the rest is replayed
    assert torch.equal(said.tokens, plain.tokens)
    torch.testing.assert_close(said.logprobs, plain.logprobs, atol=1e-4, rtol=0)


def test_compiled_blocks_say_the_same():
    batch = ragged_rollout().to(GPU)
    plain, compiled = (on_gpu(compile=wanted).logprobs(batch) for wanted in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=0)


def test_a_half_network_stays_half_under_autocast():
    """As adapters' bases do under bf16-mixed: the head multiplies halves."""
    batch = ragged_rollout().to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        assert on_gpu(dtype="bfloat16").hidden_states(batch).dtype is torch.bfloat16


def test_a_norm_is_one_kernel_and_keeps_its_input_alone():
    """And a float of each row; by rounding of halves it says what it says in fp32."""
    with GPU:
        norm = RMSNorm(LlamaRMSNorm(512), 1e-6)
        torch.nn.init.uniform_(norm.weight)
        x = torch.randn(1000, 512, requires_grad=True)
        half = x.detach().bfloat16().requires_grad_()
    halves = deepcopy(norm).bfloat16()
    before = torch.cuda.memory_allocated()
    said = halves(half)
    assert torch.cuda.memory_allocated() - before - said.nbytes == 4096  # blocks of 512
    expected = norm(x)
    torch.testing.assert_close(said.float(), expected, rtol=0.02, atol=0.02)
    said.float().sin().sum().backward()
    expected.sin().sum().backward()
    assert (half.grad - x.grad).norm() < 0.02 * x.grad.norm()
    gradient = halves.weight.grad.float()
    assert (gradient - norm.weight.grad).norm() < 0.02 * norm.weight.grad.norm()

"""Packed sequences do not see each other in any supported architecture; others keep padding."""

import pytest
import torch
from tiny_models import TINY, RandomTexts, ragged_rollout, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_align.algorithms.sft import SFT
from lit_align.models.hidden_states import padded_hidden_states
from lit_align.models.kernels.varlen_attention import ATTENTION_NAME, SequenceLengths, flash_varlen
from lit_align.models.policy import Policy

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "olmo2",
    "phi",
    "phi3",
    "gemma",
    "granite",
]


def build_policy(name: str, **settings) -> Policy:
    """Return a tiny policy of an architecture, with the same weights each time."""
    torch.manual_seed(0)
    return Policy(config={**TINY, "model_type": name, "head_dim": 16, **settings})


def max_difference(policy: Policy) -> float:
    """Return the largest difference between hidden states with and without padding."""
    batch = ragged_rollout()
    real = batch.token_mask
    distance = policy.hidden_states(batch)[real] - padded_hidden_states(policy.network, batch)[real]
    return float(distance.detach().abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_with_full_attention_are_packed(name):
    policy = build_policy(name)
    assert policy.uses_packing
    assert max_difference(policy) < 1e-5


def test_gpt2_is_packed():
    policy = build_policy("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert policy.uses_packing
    assert max_difference(policy) < 1e-5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {}),
        ("mamba", {}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_other_architectures_keep_their_padding(name, settings):
    """A sliding window, a state from token to token, and ALiBi."""
    policy = build_policy(name, **settings)
    assert not policy.uses_packing


def test_attention_chosen_by_the_user_is_kept():
    policy = tiny(attn_implementation="eager")
    assert not policy.uses_packing
    assert max_difference(policy) == 0


def test_packed_sft_losses_equal_those_of_single_texts():
    """Nats of each token, packed and one text at a time; differences below 1e-5."""
    batch, policy = RandomTexts().batch(0), tiny()
    algorithm = SFT(policy=lambda: policy)
    algorithm.policy = policy
    (packed,) = algorithm.losses(batch)
    for row, length in enumerate(batch.lengths):
        (alone,) = algorithm.losses(batch.rows([row]).trim_padding())
        torch.testing.assert_close(packed[row, : length - 1], alone[0], atol=1e-5, rtol=0)
        assert packed[row, length - 1 :].abs().sum() == 0


def test_activation_checkpointing_gives_the_same_packed_gradients():
    grads = []
    for activation_checkpointing in (False, True):
        policy = tiny(activation_checkpointing=activation_checkpointing)
        policy.logprobs(ragged_rollout()).sum().backward()
        grads.append([weight.grad for weight in policy.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=0)


def test_flash_varlen_takes_grouped_heads_in_half_precision():
    """Fake tensors check shapes, dtypes and arguments without a GPU: 4 heads on 2 key heads."""
    with FakeTensorMode():
        query = torch.empty(1, 4, 10, 16, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, 2, 10, 16, dtype=torch.bfloat16, requires_grad=True)
        found = flash_varlen(query, key, key, SequenceLengths([3, 3, 4], query.device), 0.25)
        found.sum().backward()
    assert found.shape == (1, 10, 4, 16)
    assert found.dtype == torch.bfloat16
    assert query.grad.shape == query.shape
    assert key.grad.shape == key.shape


def test_saved_configuration_does_not_name_the_packed_attention(tmp_path):
    tiny().save(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()

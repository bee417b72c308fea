"""Parameters and bytes of the SLTrain paper's networks (arXiv:2406.02214), on the meta device."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_align.models.adapters.sparse_lora import SparseLowRankAdapter
from lit_align.models.sltrain import SLTrain, SparseLowRankLinear, saves_memory

# (hidden, MLP, blocks, heads, key-value heads), rank, density; as in arXiv:2406.02214
SIZES = {
    "60M": ((512, 1376, 8, 8, 8), 128, 0.03),
    "130M": ((768, 2048, 12, 12, 12), 256, 0.03),
    "350M": ((1024, 2736, 24, 16, 16), 256, 0.03),
    "1B": ((2048, 5461, 24, 32, 32), 512, 0.03),
    "7B": ((4096, 11008, 32, 32, 32), 1024, 0.05),
}
LARGE = (8192, 28672, 80, 64, 8)  # Llama 70B


def llama(sizes, num_blocks=None):
    """Return a Llama on the meta device."""
    hidden, mlp, blocks, heads, kv_heads = sizes
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=num_blocks or blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sltrain_llama(sizes, rank, density, num_blocks=None):
    network = llama(sizes, num_blocks)
    with torch.device("meta"):
        SLTrain(rank=rank, alpha=1, density=density).replace_linears(network.model.layers)
    return network


def parameters_and_positions(network):
    """Return the number of trained parameters and of sparse positions."""
    layers = [m for m in network.modules() if isinstance(m, SparseLowRankLinear)]
    return (
        sum(weight.numel() for weight in network.parameters()),
        sum(layer.sparse_index.numel() for layer in layers),
    )


def formula(sizes, rank, density):
    """Return the same by formula: (out + in) r + int(density out in) for each layer."""
    hidden, mlp, blocks, heads, kv_heads = sizes
    shapes = [(hidden, hidden)] * 2 + [(hidden * kv_heads // heads, hidden)] * 2
    shapes += [(mlp, hidden)] * 2 + [(hidden, mlp)]
    sparse = sum(int(density * out * inner) for out, inner in shapes)
    low_rank = sum((out + inner) * rank for out, inner in shapes)
    outside = 2 * 32000 * hidden + (2 * blocks + 1) * hidden
    return blocks * (low_rank + sparse) + outside, blocks * sparse


def gigabytes(number):
    return number / 1e9


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(6, 10, False), (33, 7, True)])
def test_size_of_a_layer_equals_the_formula(inputs, outputs, bias):
    new = SparseLowRankLinear(inputs, outputs, rank=3, density=0.07, alpha=1, bias=bias)
    number = int(0.07 * outputs * inputs)
    trainable = (outputs + inputs) * 3 + number + bias * outputs
    assert sum(weight.numel() for weight in new.parameters()) == trainable
    assert new.sparse_index.nbytes == 4 * number
    half = new.bfloat16()
    assert sum(value.nbytes for value in half.state_dict().values()) == 2 * trainable + 4 * number


@pytest.mark.parametrize("size", SIZES)
def test_size_of_a_network_equals_the_formula(size):
    sizes, rank, density = SIZES[size]
    assert parameters_and_positions(sltrain_llama(sizes, rank, density)) == formula(
        sizes, rank, density
    )


@pytest.mark.parametrize(
    ("size", "full", "own"), [("130M", 134, 96.5), ("350M", 368, 194), ("7B", 6738, 3145)]
)
def test_millions_of_parameters_equal_the_paper(size, full, own):
    sizes, rank, density = SIZES[size]
    count = sum(weight.numel() for weight in llama(sizes).parameters())
    assert round(count / 1e6) == full
    places = 1 if size == "130M" else 0
    assert round(formula(sizes, rank, density)[0] / 1e6, places) == own


@pytest.mark.parametrize(
    ("size", "full", "own", "low_rank"),
    [
        ("60M", 0.35, 0.27, 0.26),
        ("130M", 0.80, 0.60, 0.56),
        ("350M", 2.21, 1.24, 1.11),
        ("1B", 8.03, 4.16, 3.66),
        ("7B", 40.4, 21.5, 16.9),
    ],
)
def test_gigabytes_equal_the_papers_estimate(size, full, own, low_rank):
    """The estimate has bf16 weights, two bf16 moments, int64 positions and no gradients."""
    sizes, rank, density = SIZES[size]
    places = 1 if size == "7B" else 2
    count = sum(weight.numel() for weight in llama(sizes).parameters())
    trainable, positions = formula(sizes, rank, density)
    assert round(gigabytes(6 * count), places) == full
    assert round(gigabytes(6 * trainable + 8 * positions), places) == own
    assert round(gigabytes(6 * formula(sizes, rank, 0)[0]), places) == low_rank


@pytest.mark.parametrize(
    ("sizes", "rank", "density", "adam", "int64", "int32"),
    [
        (*SIZES["1B"], 16.1, 8.0, 7.9),
        (*SIZES["7B"], 80.9, 40.3, 39.0),
        (LARGE, 2048, 0.05, 827.7, 392.9, 379.2),
    ],
    ids=["1B", "7B", "70B"],
)
def test_gigabytes_in_training(sizes, rank, density, adam, int64, int32):
    """bf16 weights and gradients, two fp32 moments, and positions."""
    blocks = sizes[2]
    one, two = (sum(w.numel() for w in llama(sizes, n).parameters()) for n in (1, 2))
    trainable, positions = formula(sizes, rank, density)
    assert round(gigabytes(12 * (one + (blocks - 1) * (two - one))), 1) == adam
    assert round(gigabytes(12 * trainable + 8 * positions), 1) == int64
    assert round(gigabytes(12 * trainable + 4 * positions), 1) == int32


def test_gigabytes_in_training_with_dense_keys_and_values():
    with pytest.warns(UserWarning, match=r"keeps 2 of 7 layers dense, such as self_attn.k_proj"):
        (one, z_one) = parameters_and_positions(sltrain_llama(LARGE, 2048, 0.05, num_blocks=1))
    with pytest.warns(UserWarning, match=r"keeps 4 of 14 layers dense"):
        (two, z_two) = parameters_and_positions(sltrain_llama(LARGE, 2048, 0.05, num_blocks=2))
    trainable, positions = one + 79 * (two - one), z_one + 79 * (z_two - z_one)
    assert round(gigabytes(12 * trainable + 8 * positions)) == 371


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (2048, 5461), (512, 1376)])
def test_largest_rank_that_saves_memory_equals_the_formula(inputs, outputs):
    size = outputs * inputs
    largest = (size - int(0.03 * size) - 1) // (outputs + inputs)
    assert saves_memory(inputs, outputs, largest, 0.03)
    assert not saves_memory(inputs, outputs, largest + 1, 0.03)


def test_a_meta_network_has_meta_positions():
    network = sltrain_llama(SIZES["60M"][0], 128, 0.03, num_blocks=1)
    layers = [m for m in network.modules() if isinstance(m, SparseLowRankLinear)]
    assert {layer.sparse_index.dtype for layer in layers} == {torch.int32}
    assert all(layer.sparse_index.is_meta for layer in layers)
    assert type(network.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("sizes", "expected"), [(SIZES["1B"][0], 4.4), (SIZES["7B"][0], 18.6)], ids=["1B", "7B"]
)
def test_gigabytes_in_training_of_an_adapter(sizes, expected):
    """bf16 base, weights and gradients, LoRA of rank 128, density 0.01, two fp32 moments."""
    network = llama(sizes)
    base = sum(weight.numel() for weight in network.parameters())
    with torch.device("meta"):
        SparseLowRankAdapter(r=128, density=0.01).apply_to(network, "CAUSAL_LM")
    trainable = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    positions = sum(b.numel() for name, b in network.named_buffers() if "lora_sparse" in name)
    frozen = sum(weight.numel() for weight in network.parameters()) - trainable
    assert frozen == base
    assert round(gigabytes(2 * base + 12 * trainable + 8 * positions), 1) == expected

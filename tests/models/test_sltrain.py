"""Low-rank plus sparse linear layers, and networks that train them from scratch."""

from copy import deepcopy

import pytest
import torch
from tiny_models import TINY, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW

from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import Hydra
from lit_align.models.policy import Policy
from lit_align.models.sltrain import SLTrain, SparseLowRankLinear, saves_memory

SMALL = SLTrain(rank=4, alpha=2, density=0.1)
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def layer(inputs=6, outputs=10, rank=2, density=0.2, alpha=1.0, dtype=torch.float64, **more):
    """Return a layer with a random B, as after training."""
    torch.manual_seed(0)
    new = SparseLowRankLinear(inputs, outputs, rank, density, alpha, **more).to(dtype)
    new.lora_B.data.normal_()
    return new


def sltrain_policy(**settings):
    """Return a tiny policy of low-rank plus sparse layers with equal weights each time."""
    return tiny(sltrain=SMALL, **settings)


# The layer --------------------------------------------------------------------------------------


def test_a_layer_has_two_factors_and_a_sparse_part():
    new = SparseLowRankLinear(7, 5, rank=3, density=0.33, alpha=6, bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in new.named_parameters()}
    assert shapes == {"lora_A": (3, 7), "lora_B": (5, 3), "sparse_value": (11,), "bias": (5,)}
    assert new.state_dict().keys() == {*shapes, "sparse_index"}
    assert [name for name, _ in new.named_buffers()] == ["sparse_index"]
    assert new.scale == 2.0
    assert SparseLowRankLinear(7, 5, 3, 0.33, 6).bias is None


def test_a_layer_multiplies_by_its_dense_weight():
    new = layer(bias=True)
    inputs = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = nn.functional.linear(inputs, new.dense(), new.bias)
    torch.testing.assert_close(new(inputs), expected, rtol=0, atol=1e-12)
    sparse = new.dense() - new.scale * new.lora_B @ new.lora_A
    assert torch.equal(sparse.flatten().abs().gt(1e-12).nonzero().flatten(), new.sparse_index)


def test_gradients_equal_those_of_the_dense_weight():
    new, inputs = layer(bias=True), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    tensors = [inputs, *new.parameters()]
    own = torch.autograd.grad(new(inputs).square().sum(), tensors)
    dense = nn.functional.linear(inputs, new.dense(), new.bias)
    reference = torch.autograd.grad(dense.square().sum(), tensors)
    for gradient, expected in zip(own, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_a_layer_starts_as_its_sparse_part():
    torch.manual_seed(0)
    new = SparseLowRankLinear(400, 300, rank=8, density=0.03, alpha=32, bias=True)
    assert not new.lora_B.any()
    assert torch.equal(new.dense().flatten()[new.sparse_index.long()], new.sparse_value)
    assert new.dense().count_nonzero() == 3600
    bounds = {"lora_A": 400**-0.5, "sparse_value": 400**-0.5, "bias": 300**-0.5}
    for name, bound in bounds.items():
        weight = new.state_dict()[name]
        assert 0.98 * bound < weight.abs().max() <= bound
        # standard deviation of a uniform distribution, within 4 standard errors (kurtosis 1.8)
        error = 4 * (0.8 / weight.numel()) ** 0.5 / 2
        assert float(weight.std() / bound) == pytest.approx(3**-0.5, rel=error)


def test_initial_variances_of_weight_and_outputs():
    torch.manual_seed(0)
    new = SparseLowRankLinear(1000, 2000, rank=1, density=0.03, alpha=1).requires_grad_(False)
    assert float(new.dense().var()) == pytest.approx(0.03 / (3 * 1000), rel=0.02)
    outputs = new(torch.randn(500, 1000))
    assert float(outputs.std()) == pytest.approx((0.03 / 3) ** 0.5, rel=0.02)


def test_all_parts_but_a_have_a_gradient_at_the_first_step():
    torch.manual_seed(0)
    new = SparseLowRankLinear(6, 10, rank=2, density=0.2, alpha=1)
    new(torch.randn(8, 6)).square().sum().backward()
    assert not new.lora_A.grad.any()
    assert new.lora_B.grad.any()
    assert new.sparse_value.grad.any()


def test_the_weight_stays_low_rank_off_the_support():
    new = layer(dtype=torch.float32)
    positions, start = new.sparse_index.clone(), new.dense().detach()
    optimizer = AdamW(new.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        new(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    sparse = (new.dense() - new.lora_B @ (new.scale * new.lora_A)).flatten()
    off = torch.ones(60, dtype=torch.bool).index_fill(0, positions.long(), False)
    assert torch.equal(new.sparse_index, positions)
    assert sparse[off].tolist() == [0.0] * 48
    assert sparse[~off].all()
    assert not torch.equal(new.dense(), start)


def test_a_copy_shares_no_tensor():
    new = layer()
    copy, inputs = deepcopy(new), torch.randn(3, 6, dtype=torch.float64)
    before = copy(inputs)
    assert torch.equal(before, new(inputs))
    new.lora_A.data.zero_()
    new.sparse_index.zero_()
    assert torch.equal(copy(inputs), before)


def test_a_state_dict_has_the_positions():
    new, other = layer(), layer(seed=1)
    assert not torch.equal(new.sparse_index, other.sparse_index)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other.dense(), new.dense())


def test_a_seed_determines_the_support():
    one, same, other = (
        SparseLowRankLinear(40, 50, 2, 0.1, 1, seed=seed).sparse_index for seed in (5, 5, 6)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_layers_without_a_seed_have_different_supports():
    def supports():
        torch.manual_seed(5)
        return [SparseLowRankLinear(40, 50, 2, 0.1, 1).sparse_index for _ in range(3)]

    first, again = supports(), supports()
    assert len({tuple(support.tolist()) for support in first}) == 3
    assert all(map(torch.equal, first, again))  # torch's seed determines all of them


@pytest.mark.parametrize(
    ("inputs", "outputs", "density", "number"),
    [(100, 29, 0.01, 28), (29, 100, 0.01, 29), (120, 15, 0.03, 53), (6, 10, 0.2, 12)],
)
def test_number_of_entries_is_rounded_as_in_the_paper(inputs, outputs, density, number):
    """int(density * out * in): 0.01 * 29 is 0.28999999999999998, and 100 times that is 28."""
    new = SparseLowRankLinear(inputs, outputs, 1, density, 1)
    assert len(new.sparse_value) == len(new.sparse_index) == number


@pytest.mark.parametrize(("rank", "density"), [(0, 0.1), (2, -0.1), (2, 1.1)])
def test_a_layer_without_rank_or_with_an_impossible_density_is_refused(rank, density):
    with pytest.raises(ValueError, match="rank must be at least 1 and density between 0 and 1"):
        SparseLowRankLinear(4, 4, rank, density, 1)


def test_a_bfloat16_layer_has_bfloat16_gradients():
    exact = layer(64, 48, rank=4, density=0.1, dtype=torch.float32, bias=True)
    half, inputs = deepcopy(exact).bfloat16(), torch.randn(5, 64)
    outputs = half(inputs.bfloat16())
    assert outputs.dtype == half.dense().dtype == torch.bfloat16
    assert float((outputs - exact(inputs)).norm() / exact(inputs).norm()) < 0.01
    outputs.float().square().sum().backward()
    assert {weight.grad.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    new, inputs = (
        layer(64, 48, rank=4, density=0.1, dtype=torch.float32, bias=True),
        torch.randn(5, 64),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = new(inputs)
        outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert float((outputs - new(inputs)).norm() / new(inputs).norm()) < 0.01
    assert {weight.grad.dtype for weight in new.parameters()} == {torch.float32}


def test_a_layer_runs_on_fake_tensors():
    with FakeTensorMode():
        new = SparseLowRankLinear(6, 10, rank=2, density=0.2, alpha=1, bias=True)
        new(torch.randn(3, 6)).sum().backward()
    assert new.sparse_value.grad.shape == (12,)


# Networks ---------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    settings = SLTrain()
    assert (settings.rank, settings.alpha, settings.density) == (128, 32.0, 0.03)
    assert set(settings.targets) == {"attn", "attention", "mlp"}


def test_only_attention_and_mlp_of_the_blocks_are_replaced():
    network = sltrain_policy().network
    names = {
        kind: {name for name, module in network.named_modules() if type(module) is kind}
        for kind in (SparseLowRankLinear, nn.Linear, nn.Embedding)
    }
    parts = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"model.layers.{number}.{part}" for number in (0, 1) for part in parts}
    assert names[SparseLowRankLinear] == expected
    assert names[nn.Linear] == {"lm_head"}
    assert names[nn.Embedding] == {"model.embed_tokens"}


def test_targets_select_the_layers():
    policy = tiny(sltrain=SLTrain(4, 2, 0.1, targets=["mlp.down"]))
    replaced = [n for n, m in policy.named_modules() if isinstance(m, SparseLowRankLinear)]
    assert replaced == [f"network.model.layers.{number}.mlp.down_proj" for number in (0, 1)]


def test_layers_of_equal_shape_have_different_supports():
    first, second = sltrain_policy().network.model.layers
    supports = [first.mlp.gate_proj, first.mlp.up_proj, second.mlp.gate_proj]
    supports = {tuple(layer.sparse_index.tolist()) for layer in supports}
    assert len(supports) == 3


def test_a_new_layer_has_the_sizes_bias_and_dtype_of_the_replaced_one():
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48}
    policy = Policy(config={**TINY, **sizes, "model_type": "qwen2"}, sltrain=SMALL, dtype="float64")
    attention, mlp = policy.network.model.layers[0].self_attn, policy.network.model.layers[0].mlp
    assert attention.q_proj.bias.shape == (32,)
    assert attention.o_proj.bias is None
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (48, 32)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("inputs", "outputs", "density", "largest"),
    [(4096, 4096, 0.05, 1945), (2048, 2048, 0.03, 993)],
)
def test_largest_rank_that_saves_memory(inputs, outputs, density, largest):
    assert saves_memory(inputs, outputs, largest, density)
    assert not saves_memory(inputs, outputs, largest + 1, density)


def test_an_equal_number_of_parameters_saves_nothing():
    assert (4 + 4) * 1 + int(0.5 * 16) == 16
    assert not saves_memory(4, 4, 1, 0.5)
    assert saves_memory(4, 4, 1, 0.4)


def test_grouped_keys_and_values_stay_dense_if_factors_are_larger():
    assert not saves_memory(4096, 1024, 1024, 0.05)
    assert not saves_memory(4096, 1024, 1024, 0.0)
    # TINY: k and v (32 x 16) get smaller up to rank 9, q and o (32 x 32) up to 14
    with pytest.warns(UserWarning, match=r"keeps 4 of 14 layers dense, such as self_attn.k_proj"):
        policy = tiny(sltrain=SLTrain(rank=12, alpha=3, density=0.1))
    attention = policy.network.model.layers[0].self_attn
    assert type(attention.k_proj) is type(attention.v_proj) is nn.Linear
    assert isinstance(attention.q_proj, SparseLowRankLinear)


def test_a_rank_that_makes_no_layer_smaller_is_refused():
    with pytest.raises(ValueError, match=r"would make none of the 14 targeted layers smaller"):
        tiny(sltrain=SLTrain(rank=32, alpha=8))


def test_blocks_without_targeted_layers_are_refused():
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="no linear layer with one of attn, attention, mlp in its"):
        Policy(config=gpt2, sltrain=SMALL)


def test_pretrained_weights_and_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would discard the weights of .* Set config and"):
        Policy(str(tmp_path), sltrain=SMALL)
    with pytest.raises(ValueError, match="sltrain and lora cannot be combined"):
        Policy(config=dict(TINY), lora=LoRA(r=2), sltrain=SMALL)
    with pytest.raises(ValueError, match="sltrain and lora cannot be combined"):
        Hydra(config=dict(TINY), sltrain=SMALL)

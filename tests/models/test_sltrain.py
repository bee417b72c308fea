"""Linear layers that are low-rank plus sparse, and networks that train them from scratch."""

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
    """A layer that has learnt: B is not zero."""
    torch.manual_seed(0)
    made = SparseLowRankLinear(inputs, outputs, rank, density, alpha, **more).to(dtype)
    made.lora_B.data.normal_()
    return made


def slim(**settings):
    """A tiny policy of low-rank plus sparse layers, the same each time."""
    return tiny(sltrain=SMALL, **settings)


# The layer --------------------------------------------------------------------------------------


def test_the_layer_has_the_papers_parts():
    made = SparseLowRankLinear(7, 5, rank=3, density=0.33, alpha=6, bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in made.named_parameters()}
    assert shapes == {"lora_A": (3, 7), "lora_B": (5, 3), "sparse_value": (11,), "bias": (5,)}
    assert made.state_dict().keys() == {*shapes, "sparse_index"}
    assert [name for name, _ in made.named_buffers()] == ["sparse_index"]
    assert made.scale == 2.0
    assert SparseLowRankLinear(7, 5, 3, 0.33, 6).bias is None


def test_the_layer_multiplies_by_its_dense_weight():
    made = layer(bias=True)
    inputs = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = nn.functional.linear(inputs, made.dense(), made.bias)
    torch.testing.assert_close(made(inputs), expected, rtol=0, atol=1e-12)
    sparse = made.dense() - made.scale * made.lora_B @ made.lora_A
    assert torch.equal(sparse.flatten().abs().gt(1e-12).nonzero().flatten(), made.sparse_index)


def test_gradients_equal_those_of_the_dense_weight():
    made, inputs = layer(bias=True), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    tensors = [inputs, *made.parameters()]
    own = torch.autograd.grad(made(inputs).square().sum(), tensors)
    dense = nn.functional.linear(inputs, made.dense(), made.bias)
    reference = torch.autograd.grad(dense.square().sum(), tensors)
    for gradient, expected in zip(own, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_a_layer_starts_as_its_sparse_part():
    torch.manual_seed(0)
    made = SparseLowRankLinear(400, 300, rank=8, density=0.03, alpha=32, bias=True)
    assert not made.lora_B.any()
    assert torch.equal(made.dense().flatten()[made.sparse_index.long()], made.sparse_value)
    assert made.dense().count_nonzero() == 3600
    bounds = {"lora_A": 400**-0.5, "sparse_value": 400**-0.5, "bias": 300**-0.5}
    for name, bound in bounds.items():
        weight = made.state_dict()[name]
        assert 0.98 * bound < weight.abs().max() <= bound
        # a uniform distribution's deviation, to 4 standard errors (kurtosis 1.8)
        error = 4 * (0.8 / weight.numel()) ** 0.5 / 2
        assert float(weight.std() / bound) == pytest.approx(3**-0.5, rel=error)


def test_the_papers_start_statistics():
    torch.manual_seed(0)
    made = SparseLowRankLinear(1000, 2000, rank=1, density=0.03, alpha=1).requires_grad_(False)
    assert float(made.dense().var()) == pytest.approx(0.03 / (3 * 1000), rel=0.02)
    outputs = made(torch.randn(500, 1000))
    assert float(outputs.std()) == pytest.approx((0.03 / 3) ** 0.5, rel=0.02)


def test_at_the_first_step_a_gets_no_gradient_and_the_others_do():
    torch.manual_seed(0)
    made = SparseLowRankLinear(6, 10, rank=2, density=0.2, alpha=1)
    made(torch.randn(8, 6)).square().sum().backward()
    assert not made.lora_A.grad.any()
    assert made.lora_B.grad.any()
    assert made.sparse_value.grad.any()


def test_the_weight_is_low_rank_off_the_support_for_ever():
    made = layer(dtype=torch.float32)
    positions, start = made.sparse_index.clone(), made.dense().detach()
    optimizer = AdamW(made.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        made(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    sparse = (made.dense() - made.lora_B @ (made.scale * made.lora_A)).flatten()
    off = torch.ones(60, dtype=torch.bool).index_fill(0, positions.long(), False)
    assert torch.equal(made.sparse_index, positions)
    assert sparse[off].tolist() == [0.0] * 48
    assert sparse[~off].all()
    assert not torch.equal(made.dense(), start)


def test_a_copy_is_a_layer_of_its_own():
    made = layer()
    copy, inputs = deepcopy(made), torch.randn(3, 6, dtype=torch.float64)
    before = copy(inputs)
    assert torch.equal(before, made(inputs))
    made.lora_A.data.zero_()
    made.sparse_index.zero_()
    assert torch.equal(copy(inputs), before)


def test_a_layer_takes_its_positions_from_the_state_dict():
    made, other = layer(), layer(seed=1)
    assert not torch.equal(made.sparse_index, other.sparse_index)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.dense(), made.dense())


def test_a_seed_draws_one_support_whatever_else_was_drawn():
    one, same, other = (
        SparseLowRankLinear(40, 50, 2, 0.1, 1, seed=seed).sparse_index for seed in (5, 5, 6)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_layers_that_are_built_one_after_the_other_have_supports_of_their_own():
    def supports():
        torch.manual_seed(5)
        return [SparseLowRankLinear(40, 50, 2, 0.1, 1).sparse_index for _ in range(3)]

    first, again = supports(), supports()
    assert len({tuple(support.tolist()) for support in first}) == 3
    assert all(map(torch.equal, first, again))  # one seed of torch's builds one network


@pytest.mark.parametrize(
    ("inputs", "outputs", "density", "number"),
    [(100, 29, 0.01, 28), (29, 100, 0.01, 29), (120, 15, 0.03, 53), (6, 10, 0.2, 12)],
)
def test_entries_are_counted_in_the_papers_order(inputs, outputs, density, number):
    """int(density * out * in): 0.01 * 29 is 0.28999999999999998, and a hundred of it are 28."""
    made = SparseLowRankLinear(inputs, outputs, 1, density, 1)
    assert len(made.sparse_value) == len(made.sparse_index) == number


@pytest.mark.parametrize(("rank", "density"), [(0, 0.1), (2, -0.1), (2, 1.1)])
def test_a_layer_without_rank_or_with_an_impossible_density_is_refused(rank, density):
    with pytest.raises(ValueError, match="a rank of at least 1 and a density from 0 to 1, found"):
        SparseLowRankLinear(4, 4, rank, density, 1)


def test_bfloat16_throughout():
    exact = layer(64, 48, rank=4, density=0.1, dtype=torch.float32, bias=True)
    half, inputs = deepcopy(exact).bfloat16(), torch.randn(5, 64)
    outputs = half(inputs.bfloat16())
    assert outputs.dtype == half.dense().dtype == torch.bfloat16
    assert float((outputs - exact(inputs)).norm() / exact(inputs).norm()) < 0.01
    outputs.float().square().sum().backward()
    assert {weight.grad.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_autocast_multiplies_in_half_and_keeps_gradients_whole():
    made, inputs = (
        layer(64, 48, rank=4, density=0.1, dtype=torch.float32, bias=True),
        torch.randn(5, 64),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = made(inputs)
        outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert float((outputs - made(inputs)).norm() / made(inputs).norm()) < 0.01
    assert {weight.grad.dtype for weight in made.parameters()} == {torch.float32}


def test_a_layer_runs_on_fake_tensors():
    with FakeTensorMode():
        made = SparseLowRankLinear(6, 10, rank=2, density=0.2, alpha=1, bias=True)
        made(torch.randn(3, 6)).sum().backward()
    assert made.sparse_value.grad.shape == (12,)


# Networks ---------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    settings = SLTrain()
    assert (settings.rank, settings.alpha, settings.density) == (128, 32.0, 0.03)
    assert set(settings.targets) == {"attn", "attention", "mlp"}


def test_attention_and_mlp_of_the_blocks_are_replaced_and_nothing_else():
    network = slim().network
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


def test_targets_choose_the_layers():
    policy = tiny(sltrain=SLTrain(4, 2, 0.1, targets=["mlp.down"]))
    replaced = [n for n, m in policy.named_modules() if isinstance(m, SparseLowRankLinear)]
    assert replaced == [f"network.model.layers.{number}.mlp.down_proj" for number in (0, 1)]


def test_layers_of_one_shape_have_supports_of_their_own():
    first, second = slim().network.model.layers
    supports = [first.mlp.gate_proj, first.mlp.up_proj, second.mlp.gate_proj]
    supports = {tuple(layer.sparse_index.tolist()) for layer in supports}
    assert len(supports) == 3


def test_a_new_layer_has_the_bias_dtype_and_sizes_of_the_old_one():
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
def test_break_even(inputs, outputs, density, largest):
    assert saves_memory(inputs, outputs, largest, density)
    assert not saves_memory(inputs, outputs, largest + 1, density)


def test_equally_many_numbers_are_no_saving():
    assert (4 + 4) * 1 + int(0.5 * 16) == 16
    assert not saves_memory(4, 4, 1, 0.5)
    assert saves_memory(4, 4, 1, 0.4)


def test_grouped_keys_and_values_stay_dense_where_low_rank_is_larger():
    assert not saves_memory(4096, 1024, 1024, 0.05)
    assert not saves_memory(4096, 1024, 1024, 0.0)
    # of TINY: k and v, 32 x 16, save up to rank 9; q and o, 32 x 32, up to 14; the others more
    with pytest.warns(UserWarning, match=r"leaves 4 of 14 layers dense, such as self_attn.k_proj"):
        policy = tiny(sltrain=SLTrain(rank=12, alpha=3, density=0.1))
    attention = policy.network.model.layers[0].self_attn
    assert type(attention.k_proj) is type(attention.v_proj) is nn.Linear
    assert isinstance(attention.q_proj, SparseLowRankLinear)


def test_a_rank_at_which_nothing_is_saved_is_refused():
    with pytest.raises(ValueError, match=r"fewer numbers than any of the 14 layers it is for"):
        tiny(sltrain=SLTrain(rank=32, alpha=8))


def test_blocks_without_such_layers_are_refused():
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="no linear layer whose name holds one of attn, attention"):
        Policy(config=gpt2, sltrain=SMALL)


def test_pretrained_weights_and_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would throw those of .* away: give a config"):
        Policy(str(tmp_path), sltrain=SMALL)
    with pytest.raises(ValueError, match="all weights of a block, and an adapter freezes them"):
        Policy(config=dict(TINY), lora=LoRA(r=2), sltrain=SMALL)
    with pytest.raises(ValueError, match="all weights of a block, and an adapter freezes them"):
        Hydra(config=dict(TINY), sltrain=SMALL)

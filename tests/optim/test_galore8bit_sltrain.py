"""8-bit moments and steps during backward for low-rank plus sparse networks."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lit_align.batches import TextBatch
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.sltrain import SLTrain, SparseLowRankLinear
from lit_align.optim.galore8bit import GaLore8bit

pytest.importorskip("torchao", reason="8-bit moments need torchao")

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 320,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.1,
}  # fmt: skip
RANK, DENSITY = 32, 0.13  # 128 x 128 x 0.13 = 2,129 and 320 x 128 x 0.13 = 5,324 entries
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS, dtype=torch.bool)
TEXTS = TextBatch(tokens=IDS, token_mask=ONES, target_mask=ONES, lengths=[12] * 4)


def network(kind=Policy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config=dict(SHAPE), sltrain=SLTrain(RANK, alpha=16, density=DENSITY))


def optimizer_of(model: nn.Module, **settings) -> GaLore8bit:
    return GaLore8bit(model.named_parameters(), lr=1e-2, rank=None, **settings)


def learn(model: Policy, optimizer, steps: int) -> list[float]:
    """Return the mean negative log-prob in nats before each step."""
    losses = []
    for _ in range(steps):
        loss = -model.logprobs(TEXTS).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def formula(weight: Tensor) -> int:
    """Return the bytes of two moments and of the step, which has 8."""
    n = weight.numel()
    return 8 + 2 * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n)


@pytest.mark.parametrize("per_layer", [False, True])
def test_each_part_has_the_state_of_the_formula(per_layer):
    model = network()
    optimizer = optimizer_of(model, per_layer=per_layer)
    learn(model, optimizer, 1)
    coded = set()
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        assert size(state.values()) == formula(weight), name
        if "exp_avg_scale" in state:
            coded.add(name.rpartition(".")[2])
    assert coded == {"lora_A", "lora_B", "sparse_value", "weight"}  # weight: embedding and head
    layer = model.get_submodule("network.model.layers.0.mlp.gate_proj")
    assert isinstance(layer, SparseLowRankLinear)
    assert optimizer.state[layer.sparse_value]["exp_avg_scale"].shape == (21,)  # 5,324 = 20.8 x 256


def test_the_state_is_a_third_of_adam_if_half_of_the_moments_are_small():
    """It would be a quarter, 1.016 / 4, if all were large."""
    model, plain = network(), network()
    optimizer, adam = optimizer_of(model), AdamW(plain.parameters(), lr=1e-2)
    learn(model, optimizer, 1)
    learn(plain, adam, 1)
    small, large = (
        sum(size(state.values()) for state in each.state.values()) for each in (optimizer, adam)
    )
    numbers = sum(weight.numel() for weight in model.parameters())
    assert large == 8 * numbers + 4 * len(list(model.parameters()))  # AdamW's step is a float32
    assert small / large == pytest.approx(0.3147, abs=1e-4)


def test_steps_during_backward_are_the_same_steps():
    plain, during = network(), network()
    losses = [
        learn(model, optimizer_of(model, per_layer=per_layer), 6)
        for model, per_layer in ((plain, False), (during, True))
    ]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, plain.parameters(), during.parameters()))
    assert all(weight.grad is None for weight in during.parameters())


def test_each_gradient_is_freed_before_the_next_is_complete():
    """At most one parameter has a gradient during backward."""
    model = network()
    optimizer = optimizer_of(model, per_layer=True)
    weights, counts = list(model.parameters()), []

    def count_gradients(_: Tensor) -> None:
        counts.append(sum(weight.grad is not None for weight in weights))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(count_gradients)  # after the optimizer's hook
    learn(model, optimizer, 1)
    assert len(counts) == len(weights)
    assert set(counts) == {0}


def test_positions_are_fixed_and_the_loss_falls_as_with_float32_moments():
    model, plain = network(), network()
    before = [layer.sparse_index.clone() for layer in layers(model)]
    coded = learn(model, optimizer_of(model, per_layer=True), 40)
    exact = learn(plain, AdamW(plain.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.0), 40)
    assert coded[0] == exact[0] > 4.0
    assert coded[-1] < 0.5
    assert exact[-1] < 0.5
    assert all(map(torch.equal, before, [layer.sparse_index for layer in layers(model)]))


def layers(model: nn.Module) -> list[SparseLowRankLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]


def test_the_first_step_is_the_step_of_adam():
    """Moments are coded after use, and eps is added before the bias correction."""
    model, plain = network(), network()
    learn(model, optimizer_of(model), 1)
    adam = AdamW(plain.parameters(), lr=1e-2, eps=1e-6 / math.sqrt(1 - 0.999), weight_decay=0.0)
    learn(plain, adam, 1)
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_equal_to_the_bit(tmp_path):
    model = network()
    optimizer = optimizer_of(model, per_layer=True)
    learn(model, optimizer, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "middle.pt")
    learn(model, optimizer, 3)
    again = network()
    resumed = optimizer_of(again, per_layer=True)
    weights, state = torch.load(tmp_path / "middle.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    learn(again, resumed, 3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_reward_model_learns_with_it():
    model = network(ScalarHead)
    optimizer = optimizer_of(model, per_layer=True)
    target, losses = torch.tensor([1.0, -1.0, 0.5, 2.0]), []
    for _ in range(30):
        loss = (model.scores(TEXTS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_a_second_backward_is_refused():
    model = network()
    optimizer = optimizer_of(model, per_layer=True)
    assert optimizer.per_layer
    model.logprobs(TEXTS).sum().backward()
    with pytest.raises(ValueError, match="Set a larger microbatch_tokens so that a batch is one"):
        model.logprobs(TEXTS).sum().backward()

"""GaLore for a model: projected matrices, saved state, and steps during backward."""

import math
from contextlib import contextmanager

import pytest
import torch
from tiny_models import RandomTexts, tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.models.policy import Policy
from lit_align.optim.galore import GaLore, GaLoreAdamW
from lit_align.optim.galore8bit import GaLore8bit

MATRICES = 7  # q, k, v, o, gate, up, down of a block


def loss(policy: Policy, number: int) -> Tensor:
    batch = RandomTexts().batch(number)
    return -policy.logprobs(batch).sum() / batch.loss_mask.sum()


def train(policy: Policy, optimizer: GaLoreAdamW, first: int = 0, last: int = 6) -> None:
    for number in range(first, last):
        loss(policy, number).backward()
        optimizer.step()
        optimizer.zero_grad()


def build(policy: Policy, **settings) -> GaLore:
    defaults = {"lr": 1e-2, "rank": 4, "update_gap": 2}
    return GaLore(policy.named_parameters(), **{**defaults, **settings})


def projected(model: nn.Module, **settings) -> set[str]:
    """Return the names of the matrices that have a projector after a step."""
    optimizer = GaLore(model.named_parameters(), lr=1e-2, **settings)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return {
        name for name, param in model.named_parameters() if "projector" in optimizer.state[param]
    }


# Projected matrices -----------------------------------------------------------------------------


def test_only_the_matrices_of_the_blocks_are_projected(tiny_policy):
    names = projected(tiny_policy, rank=4)
    assert len(names) == 2 * MATRICES
    assert all("attn" in name or "mlp" in name for name in names)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}, 4),
        ({"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, **SIZES}, 6),
        ({"model_type": "gpt_neox", "intermediate_size": 32, **SIZES}, 4),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_the_default_targets_match_other_architectures(settings, expected):
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    names = projected(network, rank=2)
    assert len(names) == expected
    assert not any("embed" in name or "head" in name for name in names)


def test_targets_choose_by_name(tiny_policy):
    names = projected(tiny_policy, rank=4, targets=r"\.1\.mlp\.")
    assert {name.split(".")[-2] for name in names} == {"gate_proj", "up_proj", "down_proj"}
    assert len(names) == 3


def test_narrow_matrices_of_grouped_queries_are_not_projected(tiny_policy):
    """k and v are 16 x 32 and save memory up to rank 12; q and o, 32 x 32, up to rank 21."""
    names = projected(tiny_policy, rank=13)
    assert len(names) == 2 * (MATRICES - 2)
    assert not any("k_proj" in name or "v_proj" in name for name in names)


@pytest.mark.parametrize("settings", [{"rank": 32}, {"rank": 4, "targets": "no_such_layer"}])
def test_an_optimizer_that_would_project_nothing_is_refused(tiny_policy, settings):
    with pytest.raises(ValueError, match="would project none of 21 parameters, found rank"):
        GaLore(tiny_policy.named_parameters(), lr=1e-2, **settings)


def test_parameters_without_names_are_refused(tiny_policy):
    with pytest.raises(ValueError, match="by parameter name, found parameters without names"):
        GaLore(tiny_policy.parameters(), lr=1e-2, rank=4)


def test_rank_none_is_adam_for_parameters_without_names(tiny_policy):
    other = tiny()
    train(tiny_policy, GaLore(tiny_policy.parameters(), lr=1e-2, rank=None))
    train(other, GaLoreAdamW(other.parameters(), lr=1e-2))
    for actual, plain in zip(tiny_policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, plain)


def test_8_bit_moments_without_torchao_are_refused(tiny_policy, monkeypatch):
    monkeypatch.setattr("lit_align.optim.galore8bit.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchao, found none"):
        GaLore8bit(tiny_policy.named_parameters(), lr=1e-2, rank=4)


def test_groups_keep_their_own_settings(tiny_policy):
    layers = tiny_policy.network.model.layers
    groups = [
        {"params": [(f".0.{name}", p) for name, p in layers[0].named_parameters()], "lr": 1.0},
        {"params": [(f".1.{name}", p) for name, p in layers[1].named_parameters()], "rank": 2},
    ]
    first, second = GaLore(groups, lr=1e-2, rank=4, update_gap=7).param_groups
    assert (first["lr"], first["rank"], first["update_gap"]) == (1.0, 4, 7)
    assert (second["lr"], second["rank"], second["update_gap"]) == (1e-2, 2, 7)


# Saved state ------------------------------------------------------------------------------------


def test_the_state_is_made_of_plain_tensors(tiny_policy):
    optimizer = build(tiny_policy)
    train(tiny_policy, optimizer)
    for state in optimizer.state_dict()["state"].values():
        assert (
            {"step", "exp_avg", "exp_avg_sq"}
            <= set(state)
            <= {*("step", "exp_avg", "exp_avg_sq", "projector")}
        )
        assert all(type(value) is Tensor for value in state.values())


@pytest.mark.parametrize("stop", [1, 2, 5])  # within a period, between two, and in the last one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_equal_to_the_bit(tiny_policy, tmp_path, stop, dtype):
    path, policy = tmp_path / "middle.pt", tiny_policy.to(dtype)
    optimizer = build(policy)
    train(policy, optimizer, 0, stop)
    torch.save({"weights": policy.state_dict(), "optimizer": optimizer.state_dict()}, path)
    train(policy, optimizer, stop)
    resumed = tiny().to(dtype)
    again, saved = build(resumed), torch.load(path, weights_only=True)
    resumed.load_state_dict(saved["weights"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, stop)
    for actual, expected in zip(resumed.parameters(), policy.parameters(), strict=True):
        assert torch.equal(actual, expected)
        assert again.state[actual].keys() == optimizer.state[expected].keys()
        for key, value in optimizer.state[expected].items():
            assert torch.equal(again.state[actual][key], value)


# Steps during backward --------------------------------------------------------------------------


def test_steps_during_backward_are_the_same_steps(tiny_policy):
    other = tiny()
    train(tiny_policy, build(tiny_policy))
    train(other, build(other, per_layer=True))
    for plain, during in zip(tiny_policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(plain, during)


@contextmanager
def gradients_at_a_time(policy: Policy):
    """Yield a list that gets the number of existing gradients whenever one is complete."""
    numbers: list[int] = []
    handles = [
        param.register_post_accumulate_grad_hook(
            lambda _: numbers.append(sum(p.grad is not None for p in policy.parameters()))
        )
        for param in policy.parameters()
    ]
    yield numbers
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("per_layer", "most"), [(True, 1), (False, 21)])
def test_at_most_one_gradient_exists_at_a_time(tiny_policy, per_layer, most):
    with gradients_at_a_time(tiny_policy) as numbers:
        optimizer = build(tiny_policy, per_layer=per_layer)
        train(tiny_policy, optimizer, 0, 1)
    assert len(numbers) == 21
    assert max(numbers) == most


def test_a_resumed_run_with_steps_during_backward_is_equal_to_the_bit(tiny_policy, tmp_path):
    optimizer = build(tiny_policy, per_layer=True)
    train(tiny_policy, optimizer, 0, 3)
    saved = tiny_policy.state_dict(), optimizer.state_dict()
    torch.save(saved, tmp_path / "middle.pt")
    train(tiny_policy, optimizer, 3)
    resumed = tiny()
    again = build(resumed, per_layer=True)
    weights, state = torch.load(tmp_path / "middle.pt", weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, 3)
    for actual, expected in zip(resumed.parameters(), tiny_policy.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_accumulation_is_refused_with_steps_during_backward(tiny_policy):
    optimizer = build(tiny_policy, per_layer=True)
    loss(tiny_policy, 0).backward()
    with pytest.raises(ValueError, match="allows one backward per step, found a second"):
        loss(tiny_policy, 1).backward()
    optimizer.step()
    loss(tiny_policy, 1).backward()


def test_clipping_is_refused_with_steps_during_backward(tiny_policy):
    def groups(length: float) -> list[dict]:
        return [{"params": tiny_policy.named_parameters(), "max_grad_norm": length}]

    GaLore(groups(math.inf), lr=1e-2, rank=4, per_layer=True)
    GaLore(groups(1.0), lr=1e-2, rank=4)
    with pytest.raises(ValueError, match=r"found max_grad_norm 1.0\. Set max_grad_norm to \.inf"):
        GaLore(groups(1.0), lr=1e-2, rank=4, per_layer=True)


def test_losses_of_different_parameters_may_have_a_backward_each():
    """A policy and a critic: the gradient of each parameter is complete after one of them."""
    roles = nn.ModuleDict({name: nn.Sequential(nn.Linear(5, 5)) for name in ("policy", "critic")})
    optimizer = GaLore(roles.named_parameters(), lr=1e-2, rank=1, per_layer=True)
    for _ in range(2):
        for role in roles.values():
            role(torch.ones(1, 5)).sum().backward()
        optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_deleted_optimizer_updates_nothing(tiny_policy):
    before = [param.detach().clone() for param in tiny_policy.parameters()]
    build(tiny_policy, per_layer=True)
    optimizer = build(tiny_policy, per_layer=True)
    train(tiny_policy, optimizer, 0, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    changed = [not torch.equal(a, b) for a, b in zip(before, tiny_policy.parameters(), strict=True)]
    assert all(changed)


def test_two_optimizers_that_step_during_backward_are_refused(tiny_policy):
    optimizers = [build(tiny_policy, per_layer=True) for _ in range(2)]
    with pytest.raises(ValueError, match="found no gradient: another optimizer has freed it"):
        loss(tiny_policy, 0).backward()
    assert len(optimizers) == 2

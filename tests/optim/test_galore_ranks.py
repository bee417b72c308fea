"""GaLore on weights sharded over two ranks equals GaLore on unsharded weights."""

import math
from typing import Any

import pytest
import torch
from tiny_models import distance, weights
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lit_align.optim.galore import GaLore, leading_singular_vectors, project

STEPS = 8
SETTINGS = {"lr": 1e-2, "rank": 2, "update_gap": 3, "weight_decay": 0.1, "targets": "."}


def network(dtype: torch.dtype) -> nn.Sequential:
    """Return a network of matrices 9 x 6, 7 x 9 and 7 x 7, whose rows do not divide by two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 7)]
        return nn.Sequential(*layers).to(dtype)


def sharded(dtype: torch.dtype) -> nn.Sequential:
    model = network(dtype)
    for layer in (*model, model):
        fully_shard(layer)
    return model


def train(
    model: nn.Sequential,
    optimizer: GaLore,
    first: int = 0,
    last: int = STEPS,
    max_norm: float = 0.1,
) -> None:
    """Make steps on the rows of this rank in batches of 8; all gradients are clipped to 0.1."""
    rank, world = 0, 1
    if isinstance(model[0].weight, DTensor):
        rank, world = distributed.get_rank(), distributed.get_world_size()
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(8, 6, generator=generator, dtype=torch.float64)[rank::world]
        model(rows.to(model[0].weight.dtype)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()


def gathered_state(model: nn.Sequential, optimizer: GaLore) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def train_sharded(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], int]:
    """Return gathered weights and state, and how many numbers of the state this rank has."""
    model = sharded(dtype)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    train(model, optimizer)
    kept = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert all(isinstance(value, DTensor) for value in kept)
    numbers = sum(value.to_local().numel() for value in kept)
    return weights(model), gathered_state(model, optimizer), numbers


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_two_ranks_equal_one(two_ranks, dtype, limit):
    model = network(dtype)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    train(model, optimizer)
    state = gathered_state(model, optimizer)["state"]
    assert distance(weights(model), weights(network(dtype))) > 1e-2
    for actual, gathered, _ in two_ranks(train_sharded, dtype):
        assert distance(actual, weights(model)) < limit
        for name, values in state.items():
            assert gathered["state"][name].keys() == values.keys()
            assert gathered["state"][name]["step"] == values["step"] == STEPS
            floats = [key for key in values if key != "step"]
            found = [gathered["state"][name][key] for key in floats]
            assert distance(found, [values[key] for key in floats]) < limit


def test_the_state_is_sharded_over_the_ranks(two_ranks):
    model = network(torch.float64)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    train(model, optimizer)
    states = optimizer.state.values()
    total = sum(v.numel() for state in states for k, v in state.items() if k != "step")
    numbers = [number for _, _, number in two_ranks(train_sharded, torch.float64)]
    assert sum(numbers) == total
    assert max(numbers) < 0.6 * total


def train_during_backward() -> list[Tensor]:
    model = sharded(torch.float64)
    optimizer = GaLore(model.named_parameters(), **SETTINGS, per_layer=True)
    train(model, optimizer, max_norm=math.inf)
    return weights(model)


def test_two_ranks_with_steps_during_backward_equal_one(two_ranks):
    model = network(torch.float64)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    train(model, optimizer, max_norm=math.inf)
    for actual in two_ranks(train_during_backward):
        assert distance(actual, weights(model)) < 1e-9


def train_replicas_during_backward() -> None:
    model = DistributedDataParallel(network(torch.float64))
    optimizer = GaLore(model.named_parameters(), **SETTINGS, per_layer=True)
    train(model.module, optimizer)


def test_ddp_with_steps_during_backward_is_refused(two_ranks):
    with pytest.raises(
        AssertionError, match=r"step on the gradient of one rank\. Shard with FSDP2"
    ):
        two_ranks(train_replicas_during_backward)


def shard(gradient: Tensor) -> DTensor:
    return distribute_tensor(gradient, init_device_mesh("cpu", (2,)), [Shard(0)])


def projected(gradient: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Return the gathered vectors and projected gradient of a sharded gradient."""
    sharded_gradient = shard(gradient)
    basis = leading_singular_vectors(sharded_gradient, 2, right)
    return basis.full_tensor(), project(sharded_gradient, basis, right).full_tensor()


@pytest.mark.parametrize("right", [True, False])
def test_a_sharded_gradient_has_the_projection_of_the_full_gradient(two_ranks, right):
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = leading_singular_vectors(gradient, 2, right)
    for basis, low in two_ranks(projected, gradient, right):
        torch.testing.assert_close(basis, expected)
        torch.testing.assert_close(low, project(gradient, expected, right))


def leading_vector_of_shard(gradient: Tensor) -> Tensor:
    """Return the leading vector of the rows of this rank."""
    return leading_singular_vectors(shard(gradient).to_local(), 1, right=True)


def test_a_shard_has_other_singular_vectors(two_ranks):
    gradient = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    assert leading_singular_vectors(gradient, 1, right=True).tolist() == [[0.0], [1.0]]
    assert [vector.tolist() for vector in two_ranks(leading_vector_of_shard, gradient)] == [
        [[1.0], [0.0]],
        [[0.0], [1.0]],
    ]


def run_and_save(path: str, stop: int) -> list[Tensor]:
    """Return the weights of an uninterrupted run, which is saved after `stop` steps."""
    model = sharded(torch.float64)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    train(model, optimizer, 0, stop)
    state = {"weights": weights(model), "optimizer": gathered_state(model, optimizer)}
    if distributed.get_rank() == 0:
        torch.save(state, path)
    distributed.barrier()
    train(model, optimizer, stop)
    return weights(model)


def resume(path: str, stop: int) -> list[Tensor]:
    """Return the weights of a run that resumes in new objects."""
    model = sharded(torch.float64)
    optimizer = GaLore(model.named_parameters(), **SETTINGS)
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for param, value in zip(model.parameters(), state["weights"], strict=True):
            param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    train(model, optimizer, stop)
    return weights(model)


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_resumed_sharded_run_is_equal_to_the_bit(two_ranks, tmp_path, stop):
    path = str(tmp_path / "middle.pt")
    runs = two_ranks(run_and_save, path, stop)
    for run, resumed in zip(runs, two_ranks(resume, path, stop), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run, resumed, strict=True))

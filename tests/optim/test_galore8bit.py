"""GaLore with 8-bit moments: bytes, accuracy, resume, steps during backward, shards."""

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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_align.optim.galore import GaLore, num_state_values
from lit_align.optim.galore8bit import GaLore8bit

pytest.importorskip("torchao", reason="8-bit moments need torchao")

STEPS = 8
SETTINGS = {"lr": 1e-2, "rank": 8, "update_gap": 3, "targets": "weight"}
CODED = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a network of matrices 512 x 64 and 64 x 512: each moment has 4,096 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64)).to(dtype)


def train(model: nn.Sequential, optimizer: GaLore, first: int = 0, last: int = STEPS) -> None:
    """Make steps on the rows of this rank in batches of 16."""
    rank, world = 0, 1
    if isinstance(model[0].weight, DTensor):
        rank, world = distributed.get_rank(), distributed.get_world_size()
    for number in range(first, last):
        rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(number))[rank::world]
        model(rows.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def run(kind: type[GaLore], last: int = STEPS, **settings: Any) -> tuple[nn.Sequential, GaLore]:
    model = network()
    optimizer = kind(model.named_parameters(), **{**SETTINGS, **settings})
    train(model, optimizer, 0, last)
    return model, optimizer


def test_a_moment_takes_a_byte_per_number_and_a_scale_per_block():
    """P is 64 x 8 in float32; M and V are 512 x 8 bytes, with 16 scales each."""
    model, optimizer = run(GaLore8bit, 1)
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        assert set(state) == CODED | {"step", "projector"}
        sizes = {name: value.nbytes for name, value in state.items()}
        assert sizes["projector"] == 64 * 8 * 4
        assert sum(sizes[name] for name in CODED) == 2 * 512 * 8 * (1 + 4 / 256)
    numbers = num_state_values(512, 64, 8) - 64 * 8
    assert sum(sizes[name] for name in CODED) / numbers == pytest.approx(1.016, abs=5e-4)


def test_small_moments_keep_the_dtype_of_the_weights():
    model, optimizer = run(GaLore8bit, 1)
    state = optimizer.state[model[0].bias]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_of_the_quantization_map_are_stored_exactly(signed):
    _, optimizer = run(GaLore8bit, 0)
    values = torch.stack(
        [optimizer.quantization_map(signed, torch.zeros(())) * size for size in (0.5, 8.0)]
    )
    codes, scale = torch.zeros(512, dtype=torch.uint8), torch.zeros(2)
    optimizer.quantize(values.flatten(), codes, scale, signed)
    assert scale.tolist() == [0.5, 8.0]
    assert torch.equal(optimizer.dequantize(codes, scale, signed), values.flatten())


def test_the_first_step_is_exact():
    (exact, _), (coded, _) = run(GaLore, 1), run(GaLore8bit, 1)
    for one, other in zip(exact.parameters(), coded.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_later_steps_are_close_to_steps_with_float32_moments():
    (exact, _), (coded, _) = run(GaLore), run(GaLore8bit)
    start = weights(network())
    moved = [a - b for a, b in zip(weights(exact), start, strict=True)]
    coded_moves = [a - b for a, b in zip(weights(coded), start, strict=True)]
    assert 0 < distance(coded_moves, moved) < 0.03


def test_chunks_of_a_moment_give_the_same_steps(monkeypatch):
    unsplit, _ = run(GaLore8bit)
    monkeypatch.setattr("lit_align.optim.galore8bit.FLOAT_CHUNK_SIZE", 1024)
    split, _ = run(GaLore8bit)
    assert all(map(torch.equal, unsplit.parameters(), split.parameters()))


def test_steps_during_backward_are_the_same_steps():
    (plain, _), (during, optimizer) = run(GaLore8bit), run(GaLore8bit, per_layer=True)
    assert set(optimizer.state[during[0].weight]) == CODED | {"step", "projector"}
    assert all(map(torch.equal, plain.parameters(), during.parameters()))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_equal_to_the_bit(tmp_path, dtype, per_layer):
    model = network(dtype)
    optimizer = GaLore8bit(model.named_parameters(), **SETTINGS, per_layer=per_layer)
    train(model, optimizer, 0, 4)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "middle.pt")
    train(model, optimizer, 4)
    resumed = network(dtype)
    again = GaLore8bit(resumed.named_parameters(), **SETTINGS, per_layer=per_layer)
    saved, state = torch.load(tmp_path / "middle.pt", weights_only=True)
    resumed.load_state_dict(saved)
    again.load_state_dict(state)
    train(resumed, again, 4)
    for actual, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)
        for key, value in optimizer.state[expected].items():
            assert type(value) is Tensor
            assert again.state[actual][key].dtype == value.dtype
            assert torch.equal(again.state[actual][key], value)


# Shards -----------------------------------------------------------------------------------------


def sharded(**settings: Any) -> tuple[nn.Sequential, GaLore8bit]:
    model = network()
    for layer in (*model, model):
        fully_shard(layer)
    return model, GaLore8bit(model.named_parameters(), **{**SETTINGS, **settings})


def train_on_equal_gradients(rank: int | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return weights and state of a matrix after three steps with equal gradients on all ranks."""
    model, optimizer = sharded(rank=rank)
    matrix = model[0].weight
    for number in range(3):
        gradient = torch.randn(512, 64, generator=torch.Generator().manual_seed(number))
        matrix.grad = distribute_tensor(gradient, matrix.device_mesh, matrix.placements)
        optimizer.step()
    state = optimizer.state[matrix]
    assert state["exp_avg"].to_local().numel() * 2 == state["exp_avg"].numel()
    gathered = {key: value.full_tensor() for key, value in state.items() if key != "step"}
    return [matrix.full_tensor().detach()], gathered


def test_two_ranks_have_the_codes_of_one(two_ranks):
    model = network()
    optimizer = GaLore8bit(model.parameters(), **{**SETTINGS, "rank": None})
    matrix = model[0].weight
    for number in range(3):
        matrix.grad = torch.randn(512, 64, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    for (actual,), state in two_ranks(train_on_equal_gradients, None):
        assert torch.equal(actual, matrix)
        assert state.keys() == CODED
        assert all(torch.equal(value, optimizer.state[matrix][key]) for key, value in state.items())


def run_and_save(path: str, stop: int, per_layer: bool) -> list[Tensor]:
    """Return the weights of an uninterrupted run, which is saved after `stop` steps."""
    model, optimizer = sharded(per_layer=per_layer)
    train(model, optimizer, 0, stop)
    kept = optimizer.state[model[2].weight]  # projected from the left
    assert all(kept[name].to_local().numel() * 2 == kept[name].numel() for name in CODED)
    options = StateDictOptions(full_state_dict=True)
    state = weights(model), get_optimizer_state_dict(model, optimizer, options=options)
    if distributed.get_rank() == 0:
        torch.save(state, path)
    distributed.barrier()
    train(model, optimizer, stop)
    return weights(model)


def resume(path: str, stop: int, per_layer: bool) -> list[Tensor]:
    """Return the weights of a run that resumes in new objects."""
    model, optimizer = sharded(per_layer=per_layer)
    saved, state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for param, value in zip(model.parameters(), saved, strict=True):
            param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    train(model, optimizer, stop)
    return weights(model)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_resumed_sharded_run_is_equal_to_the_bit(two_ranks, tmp_path, per_layer):
    path = str(tmp_path / "middle.pt")
    runs = two_ranks(run_and_save, path, 4, per_layer)
    for expected, resumed in zip(runs, two_ranks(resume, path, 4, per_layer), strict=True):
        assert all(map(torch.equal, expected, resumed))

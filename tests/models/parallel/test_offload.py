"""Offloading moves networks and optimizer state, keeps values, and loads one network at a time."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lit_align.models.parallel import offload
from lit_align.models.parallel.offload import (
    ExclusiveOffload,
    OffloadedTensors,
    optimizer_state_tensors,
)

CPU = torch.device("cpu")


@pytest.fixture
def all_tensors_move(monkeypatch):
    """Treat CPU tensors as if they were on a GPU."""
    monkeypatch.setattr(offload, "can_offload", lambda tensor: True)


def addresses(tensors) -> list[int]:
    """Return the address of each tensor's data."""
    return [tensor.data_ptr() for tensor in tensors]


def test_on_a_cpu_nothing_moves():
    network = nn.Linear(2, 2)
    offloaded, before = OffloadedTensors(network.parameters), addresses(network.parameters())
    offloaded.offload()
    assert addresses(network.parameters()) == before
    offloaded.reload()
    assert addresses(network.parameters()) == before


def test_offloaded_weights_keep_their_values_and_their_identity(all_tensors_move):
    network = nn.Linear(2, 2)
    weights, before = list(network.parameters()), addresses(network.parameters())
    values = [weight.detach().clone() for weight in weights]
    offloaded = OffloadedTensors(network.parameters)
    for _ in range(3):
        offloaded.offload()
        assert not set(before) & set(addresses(weights))
        assert all(map(torch.equal, weights, values))
        offloaded.reload()
        assert all(map(torch.equal, weights, values))
    assert list(map(id, network.parameters())) == list(map(id, weights))
    assert all(weight.requires_grad for weight in weights)


def test_a_tensor_keeps_its_host_copy(all_tensors_move):
    weight = torch.ones(3)
    offloaded = OffloadedTensors(lambda: [weight])
    offloaded.offload()
    first = weight.data_ptr()
    offloaded.reload()
    weight.data = weight + 1  # an update on the device
    offloaded.offload()
    assert weight.data_ptr() == first
    assert weight.tolist() == [2, 2, 2]


def test_frozen_tensors_are_copied_once(all_tensors_move):
    weight = torch.ones(3)
    offloaded = OffloadedTensors(lambda: [weight], is_frozen=True)
    offloaded.offload()
    offloaded.reload()
    weight.data = weight + 1  # a change that the host copy must not have
    offloaded.offload()
    assert weight.tolist() == [1, 1, 1]


def test_tensors_of_the_cpu_are_not_reloaded():
    """An optimizer's step counter is on the CPU and must not follow the moments to the device."""
    offloaded = OffloadedTensors(lambda: [torch.ones(1)])
    offloaded.offload()
    assert not offloaded.devices
    offloaded.reload()


def test_shards_and_trained_weights_under_ddp_are_not_offloaded(monkeypatch):
    class GPUTensor:
        device, requires_grad = torch.device("cuda"), True

    assert offload.can_offload(GPUTensor())
    monkeypatch.setattr(offload.distributed, "is_initialized", lambda: True)
    assert not offload.can_offload(GPUTensor())
    GPUTensor.requires_grad = False
    assert offload.can_offload(GPUTensor())
    monkeypatch.setattr(offload, "DTensor", GPUTensor)
    assert not offload.can_offload(GPUTensor())


def test_an_optimizer_has_state_after_its_first_step():
    network = nn.Linear(2, 2)
    optimizer = AdamW(network.parameters())
    assert not list(optimizer_state_tensors(optimizer))
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    shapes = sorted(list(tensor.shape) for tensor in optimizer_state_tensors(optimizer))
    assert shapes == [
        [],
        [],
        [2],
        [2],
        [2, 2],
        [2, 2],
    ]  # per weight: two moments and a step counter


def test_a_forward_call_loads_a_network_and_offloads_the_others(all_tensors_move):
    one, two, three = networks = [nn.Linear(2, 2) for _ in range(3)]
    exclusive = ExclusiveOffload(networks)

    def is_offloaded():
        return [bool(exclusive.offloaded[network].devices) for network in networks]

    assert is_offloaded() == [False, False, False]  # Lightning has moved all to the device
    two(torch.ones(2))
    assert is_offloaded() == [True, False, True]
    two(torch.ones(2))
    three(torch.ones(2))
    assert is_offloaded() == [True, True, False]
    exclusive.offload_all()
    assert is_offloaded() == [True, True, True]
    one(torch.ones(2))
    assert is_offloaded() == [False, True, True]


def test_offloading_does_not_change_training(all_tensors_move):
    def trained_weight(offload: bool):
        torch.manual_seed(0)
        network, other = nn.Linear(3, 3), nn.Linear(3, 3)
        optimizer = AdamW(network.parameters(), lr=0.1)
        exclusive = ExclusiveOffload([network, other])
        state = OffloadedTensors(lambda: optimizer_state_tensors(optimizer))
        for _ in range(3):
            if offload:
                other(torch.ones(3))
                exclusive.offload_all()
                state.offload()
            network(torch.ones(3)).square().sum().backward()
            state.reload()
            optimizer.step()
            optimizer.zero_grad()
        return network.weight

    assert torch.equal(trained_weight(offload=True), trained_weight(offload=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_weights_take_no_gpu_memory():
    network = nn.Linear(1024, 1024, bias=False).cuda()
    offloaded, before = OffloadedTensors(network.parameters), torch.cuda.memory_allocated()
    values = network.weight.detach().cpu()
    offloaded.offload()
    assert before - torch.cuda.memory_allocated() == 4 * 1024**2
    assert network.weight.device == CPU
    assert network.weight.is_pinned()
    offloaded.reload()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(network.weight.detach().cpu(), values)

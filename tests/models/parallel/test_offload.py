"""Parking: what moves, what stays, and who is awake when."""

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
def everywhere(monkeypatch):
    """As if the CPU's tensors were on another device."""
    monkeypatch.setattr(offload, "can_offload", lambda tensor: True)


def places(tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_on_a_cpu_nothing_moves():
    network = nn.Linear(2, 2)
    offloaded, before = OffloadedTensors(network.parameters), places(network.parameters())
    offloaded.offload()
    assert places(network.parameters()) == before
    offloaded.reload()
    assert places(network.parameters()) == before


def test_what_sleeps_and_wakes_keeps_its_values_and_its_identity(everywhere):
    network = nn.Linear(2, 2)
    weights, before = list(network.parameters()), places(network.parameters())
    values = [weight.detach().clone() for weight in weights]
    offloaded = OffloadedTensors(network.parameters)
    for _ in range(3):
        offloaded.offload()
        assert not set(before) & set(places(weights))
        assert all(map(torch.equal, weights, values))
        offloaded.reload()
        assert all(map(torch.equal, weights, values))
    assert list(map(id, network.parameters())) == list(map(id, weights))
    assert all(weight.requires_grad for weight in weights)


def test_a_tensor_keeps_its_place_on_the_cpu(everywhere):
    weight = torch.ones(3)
    offloaded = OffloadedTensors(lambda: [weight])
    offloaded.offload()
    first = weight.data_ptr()
    offloaded.reload()
    weight.data = weight + 1  # what an update on the device leaves
    offloaded.offload()
    assert weight.data_ptr() == first
    assert weight.tolist() == [2, 2, 2]


def test_frozen_tensors_are_copied_once(everywhere):
    weight = torch.ones(3)
    offloaded = OffloadedTensors(lambda: [weight], is_frozen=True)
    offloaded.offload()
    offloaded.reload()
    weight.data = weight + 1  # not what a frozen tensor does
    offloaded.offload()
    assert weight.tolist() == [1, 1, 1]


def test_what_was_never_parked_does_not_wake():
    """An optimizer's step count that lives on the CPU must not follow the moments."""
    offloaded = OffloadedTensors(lambda: [torch.ones(1)])
    offloaded.offload()
    assert not offloaded.devices
    offloaded.reload()


def test_shards_and_weights_that_ddp_has_hooked_stay(monkeypatch):
    class Elsewhere:
        device, requires_grad = torch.device("cuda"), True

    assert offload.can_offload(Elsewhere())
    monkeypatch.setattr(offload.distributed, "is_initialized", lambda: True)
    assert not offload.can_offload(Elsewhere())
    Elsewhere.requires_grad = False
    assert offload.can_offload(Elsewhere())
    monkeypatch.setattr(offload, "DTensor", Elsewhere)
    assert not offload.can_offload(Elsewhere())


def test_an_optimizer_s_state_begins_with_its_first_step():
    network = nn.Linear(2, 2)
    optimizer = AdamW(network.parameters())
    assert not list(optimizer_state_tensors(optimizer))
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    shapes = sorted(list(tensor.shape) for tensor in optimizer_state_tensors(optimizer))
    assert shapes == [[], [], [2], [2], [2, 2], [2, 2]]  # two moments and a step each


def test_whoever_is_called_comes_and_the_others_leave(everywhere):
    one, two, three = networks = [nn.Linear(2, 2) for _ in range(3)]
    turns = ExclusiveOffload(networks)

    def asleep():
        return [bool(turns.offloaded[network].devices) for network in networks]

    assert asleep() == [False, False, False]  # as Lightning puts them
    two(torch.ones(2))
    assert asleep() == [True, False, True]
    two(torch.ones(2))
    three(torch.ones(2))
    assert asleep() == [True, True, False]
    turns.offload_all()
    assert asleep() == [True, True, True]
    one(torch.ones(2))
    assert asleep() == [False, True, True]


def test_a_network_learns_what_it_would_have_learnt(everywhere):
    def learnt(offload: bool):
        torch.manual_seed(0)
        network, other = nn.Linear(3, 3), nn.Linear(3, 3)
        optimizer = AdamW(network.parameters(), lr=0.1)
        turns, state = (
            ExclusiveOffload([network, other]),
            OffloadedTensors(lambda: optimizer_state_tensors(optimizer)),
        )
        for _ in range(3):
            if offload:
                other(torch.ones(3))
                turns.offload_all()
                state.offload()
            network(torch.ones(3)).square().sum().backward()
            state.reload()
            optimizer.step()
            optimizer.zero_grad()
        return network.weight

    assert torch.equal(learnt(offload=True), learnt(offload=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_parked_weights_leave_its_memory():
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

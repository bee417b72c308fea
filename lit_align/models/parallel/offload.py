"""Networks that sleep on the CPU between uses, so that one at a time is on the device.

What moves are the data of plain tensors; the tensors stay the objects that optimizers and hooks
know. On a CPU nothing moves. Three kinds stay where they are: shards (FSDP2 has split them
already), buffers (small, and DDP broadcasts them), and weights that train under DDP, whose hooks
torch would drop with the move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary


class Sleeper:
    """Tensors that are on the device while they are used.

    Each keeps its page-locked place on the CPU once it has one.

    Args:
        tensors: Says which, anew each time: an optimizer's state comes with its first step.
        frozen: Whether their values never change, so that their places need no second copy.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], frozen: bool = False):
        self.tensors, self.frozen = tensors, frozen
        self.places = WeakTensorKeyDictionary()  # on the CPU, by tensor
        self.homes = WeakTensorKeyDictionary()  # the device of each tensor that is asleep

    def park(self) -> None:
        """Moves them to the CPU; returns when they are there."""
        leaving = [tensor for tensor in self.tensors() if movable(tensor)]
        for tensor in leaving:
            if tensor not in self.places:
                self.places[tensor] = place_for(tensor).copy_(tensor.data, non_blocking=True)
            elif not self.frozen:
                self.places[tensor].copy_(tensor.data, non_blocking=True)
        if leaving and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for tensor in leaving:
            self.homes[tensor] = tensor.device
            tensor.data = self.places[tensor]

    def wake(self) -> None:
        """Moves back those that were parked."""
        for tensor, home in self.homes.items():
            tensor.data = tensor.data.to(home, non_blocking=True)
        self.homes.clear()


class Turns:
    """Networks that take turns on the device: the one that is called comes, the others leave.

    Args:
        networks: All that use their weights in `forward` alone.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.sleepers = {
            network: Sleeper(network.parameters, not any(trained(network))) for network in networks
        }
        for network in self.sleepers:
            network.register_forward_pre_hook(lambda network, inputs: self.come(network))

    def come(self, network: nn.Module | None) -> None:
        """Wakes a network and parks the others; all of them if it is None."""
        for other, sleeper in self.sleepers.items():
            if other is not network:
                sleeper.park()
        if network is not None:
            self.sleepers[network].wake()


def trained(network: nn.Module) -> Iterator[bool]:
    """Of each weight, whether it trains."""
    return (weight.requires_grad for weight in network.parameters())


def state_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors that an optimizer has beside the weights."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def movable(tensor: Tensor) -> bool:
    """Whether a tensor is on a device that it can leave."""
    return tensor.device.type != "cpu" and not stays(tensor)


def stays(tensor: Tensor) -> bool:
    """Whether a tensor may not leave its device: a shard, or a weight that trains under DDP."""
    return isinstance(tensor, DTensor) or (tensor.requires_grad and distributed.is_initialized())


def place_for(tensor: Tensor) -> Tensor:
    """An empty tensor of the same kind in page-locked memory of the CPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=torch.accelerator.is_available())

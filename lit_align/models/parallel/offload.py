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


class OffloadedTensors:
    """Tensors that are on the device while they are used.

    Each keeps its page-locked place on the CPU once it has one.

    Args:
        tensors: Says which, anew each time: an optimizer's state comes with its first step.
        is_frozen: Whether their values never change, so that they are copied to the host once.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], is_frozen: bool = False):
        self.tensors, self.is_frozen = tensors, is_frozen
        self.host_copies = WeakTensorKeyDictionary()  # on the CPU, by tensor
        self.devices = WeakTensorKeyDictionary()  # the device of each tensor that is asleep

    def offload(self) -> None:
        """Moves them to the CPU; returns when they are there."""
        moving = [tensor for tensor in self.tensors() if can_offload(tensor)]
        for tensor in moving:
            if tensor not in self.host_copies:
                self.host_copies[tensor] = pinned_like(tensor).copy_(tensor.data, non_blocking=True)
            elif not self.is_frozen:
                self.host_copies[tensor].copy_(tensor.data, non_blocking=True)
        if moving and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for tensor in moving:
            self.devices[tensor] = tensor.device
            tensor.data = self.host_copies[tensor]

    def reload(self) -> None:
        """Moves back those that were parked."""
        for tensor, device in self.devices.items():
            tensor.data = tensor.data.to(device, non_blocking=True)
        self.devices.clear()


class ExclusiveOffload:
    """Networks that take turns on the device: the one that is called comes, the others leave.

    Args:
        networks: All that use their weights in `forward` alone.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.offloaded = {
            network: OffloadedTensors(network.parameters, not any(requires_grad_flags(network)))
            for network in networks
        }
        for network in self.offloaded:
            network.register_forward_pre_hook(lambda network, inputs: self.activate(network))

    def offload_all(self) -> None:
        """Offload every network."""
        self.activate(None)

    def activate(self, network: nn.Module | None) -> None:
        """Wakes a network and parks the others; all of them if it is None."""
        for other, tensors in self.offloaded.items():
            if other is not network:
                tensors.offload()
        if network is not None:
            self.offloaded[network].reload()


def requires_grad_flags(network: nn.Module) -> Iterator[bool]:
    """Of each weight, whether it trains."""
    return (weight.requires_grad for weight in network.parameters())


def optimizer_state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors that an optimizer has beside the weights."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def can_offload(tensor: Tensor) -> bool:
    """Whether a tensor is on a device that it can leave."""
    return tensor.device.type != "cpu" and not is_pinned_to_device(tensor)


def is_pinned_to_device(tensor: Tensor) -> bool:
    """Whether a tensor may not leave its device: a shard, or a weight that trains under DDP."""
    return isinstance(tensor, DTensor) or (tensor.requires_grad and distributed.is_initialized())


def pinned_like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same kind in page-locked memory of the CPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=torch.accelerator.is_available())

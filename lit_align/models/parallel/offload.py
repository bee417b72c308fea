"""Offloading of networks and optimizer state to page-locked CPU memory between uses.

An offload replaces the data of a plain tensor. The tensor stays the same object, so that optimizers
and hooks keep it. Not offloaded: shards (already split by FSDP2), buffers (small; DDP broadcasts
them), and weights that train under DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary


class OffloadedTensors:
    """Tensors that are moved to the CPU and back. On a CPU nothing moves.

    Args:
        tensors: Function that returns the tensors. It is called for each offload, because the
            state of an optimizer exists only after its first step.
        is_frozen: True if the values never change. They are then copied to the host only once.

    Example:
        >>> offloaded = OffloadedTensors(nn.Linear(2, 2).parameters)
        >>> offloaded.offload()
        >>> len(offloaded.devices)  # nothing to move on a CPU
        0
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], is_frozen: bool = False):
        self.tensors, self.is_frozen = tensors, is_frozen
        # Weak keys, so that the host copy of a deleted weight is freed with it.
        self.host_copies = WeakTensorKeyDictionary()  # CPU tensor by tensor
        self.devices = WeakTensorKeyDictionary()  # original device by offloaded tensor

    def offload(self) -> None:
        """Move the tensors to the CPU and wait until all copies are complete."""
        moving = [tensor for tensor in self.tensors() if can_offload(tensor)]
        for tensor in moving:
            if tensor not in self.host_copies:
                # Kept for the whole run: allocating page-locked memory is slow.
                self.host_copies[tensor] = pinned_like(tensor).copy_(tensor.data, non_blocking=True)
            elif not self.is_frozen:
                self.host_copies[tensor].copy_(tensor.data, non_blocking=True)
        # The copies are asynchronous. Device memory must not be freed before they are complete.
        if moving and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for tensor in moving:
            self.devices[tensor] = tensor.device
            tensor.data = self.host_copies[tensor]

    def reload(self) -> None:
        """Move the offloaded tensors back to their devices."""
        for tensor, device in self.devices.items():
            tensor.data = tensor.data.to(device, non_blocking=True)
        self.devices.clear()


class ExclusiveOffload:
    """Keep one of several networks on the device.

    A forward call loads its network and offloads the others.

    Args:
        networks: Networks that use their weights only in `forward`.
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
        """Load one network and offload the others.

        Args:
            network: Network to load. None offloads all networks.
        """
        # Offload first, so that two networks are never on the device at once.
        for other, tensors in self.offloaded.items():
            if other is not network:
                tensors.offload()
        if network is not None:
            self.offloaded[network].reload()


def requires_grad_flags(network: nn.Module) -> Iterator[bool]:
    """Yield `requires_grad` of each weight of a network."""
    return (weight.requires_grad for weight in network.parameters())


def optimizer_state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the state tensors of an optimizer, such as AdamW's moments and step counters.

    Args:
        optimizer: Optimizer; before its first step it has no state.

    Example:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> optimizer = torch.optim.SGD([weight], momentum=0.5)
        >>> optimizer.step()
        >>> [tensor.tolist() for tensor in optimizer_state_tensors(optimizer)]
        [[1.0, 1.0, 1.0]]
    """
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def can_offload(tensor: Tensor) -> bool:
    """Return True if a tensor is on an accelerator and may be moved.

    Args:
        tensor: Tensor of any shape.
    """
    return tensor.device.type != "cpu" and not is_pinned_to_device(tensor)


def is_pinned_to_device(tensor: Tensor) -> bool:
    """Return True if a tensor must stay on its device: a shard, or a trained weight under DDP.

    Args:
        tensor: Tensor of any shape.
    """
    # DDP hooks the gradient accumulator of each trained weight. torch makes a new accumulator when
    # the data of a weight are replaced, and the hook would be lost.
    return isinstance(tensor, DTensor) or (tensor.requires_grad and distributed.is_initialized())


def pinned_like(tensor: Tensor) -> Tensor:
    """Return an empty CPU tensor of the same shape and dtype, page-locked if there is a GPU.

    Args:
        tensor: Tensor of any shape.

    Example:
        >>> pinned_like(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return torch.empty_like(tensor, device="cpu", pin_memory=torch.accelerator.is_available())

"""Switching of a network's adapters: which one is active, and which ones train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lit_align.models.weights.loading import check_adapter_base, check_adapter_task
from lit_align.models.weights.sharded_loading import cpu_placeholders


class AdapterOwner(Protocol):
    """The attributes of `Backbone` that switching reads."""

    network: PreTrainedModel
    adapted: PeftModel | None  # peft's view of the network, a child module of the owner
    trained_adapters: list[str]
    name: str  # path of the base
    task_type: str  # peft's name of the task_type

    def register_module(self, name: str, module: nn.Module | None) -> None:
        """Set a child module, as in `nn.Module`."""


class AdapterSwitching:
    """Activates, disables and loads the adapters of a network; `Backbone.adapters` returns it.

    It is not an `nn.Module` and keeps no state: the network owns peft's view and the names, so that
    nothing is registered twice and a copy of the network switches its own adapters.

    Args:
        owner: Network with adapters, or without any.
    """

    def __init__(self, owner: AdapterOwner):
        self.owner = owner

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the base alone while the context is open.

        The first trained adapter is set before, so that `set_adapter` with its name does nothing
        inside: it would switch an adapter on.
        """
        if self.owner.adapted is None:
            yield
            return
        if self.owner.trained_adapters:
            self.set_adapter(self.owner.trained_adapters[0])
        with self.owner.adapted.disable_adapter():
            self.restore_requires_grad()  # weights that FSDP2 gathers now would stay frozen
            yield
        self.restore_requires_grad()

    @contextmanager
    def use_adapter(self, name: str) -> Iterator[None]:
        """Compute with one adapter while the context is open, without gradients.

        Args:
            name: Name of the adapter in peft.
        """
        assert self.owner.adapted is not None
        before = self.owner.adapted.active_adapter
        self.set_adapter(name)
        yield
        self.set_adapter(before)

    def set_adapter(self, name: str) -> None:
        """Activate one adapter until another one is set. The backward pass needs it, too.

        Args:
            name: Name of the adapter in peft.
        """
        assert self.owner.adapted is not None
        if self.owner.adapted.active_adapter != name:
            self.owner.adapted.set_adapter(name)
            self.restore_requires_grad()

    def load_frozen_adapter(self, folder: str, name: str) -> None:
        """Load an adapter that was trained on this base, without activating it.

        Args:
            folder: Folder as peft saved it.
            name: Name of the adapter from now on.
        """
        check_adapter_base(folder, self.owner.name)
        check_adapter_task(folder, self.owner.task_type)
        network, adapted = self.owner.network, self.owner.adapted
        with cpu_placeholders(network):
            if adapted is None:
                adapted = PeftModel.from_pretrained(network, folder, adapter_name=name)
                self.owner.register_module("adapted", adapted)
            else:
                adapted.load_adapter(folder, adapter_name=name)
        self.restore_requires_grad()

    def restore_requires_grad(self) -> None:
        """Let the trained adapters train: peft freezes all but the active one on each switch."""
        assert self.owner.adapted is not None
        for name in self.owner.adapted.peft_config:
            self.owner.adapted.set_requires_grad(name, name in self.owner.trained_adapters)

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
    """Attributes of `Backbone` that adapter switching uses."""

    network: PreTrainedModel
    adapted: PeftModel | None  # peft's wrapper of the network, a child module of the owner
    trained_adapters: list[str]
    name: str  # path of the base
    task_type: str  # peft's name of the task

    def register_module(self, name: str, module: nn.Module | None) -> None:
        """Set a child module, as in `nn.Module`."""


class AdapterSwitching:
    """Switch that activates, disables and loads the adapters of a network.

    `Backbone.adapters` returns it. It is not an `nn.Module` and has no state of its own. So nothing
    is registered twice, and a copy of the network switches its own adapters.

    Args:
        owner: Network with or without adapters.
    """

    def __init__(self, owner: AdapterOwner):
        self.owner = owner

    @contextmanager
    def disable_all(self) -> Iterator[None]:
        """Compute with the base alone while the context is open."""
        if self.owner.adapted is None:
            yield
            return
        if self.owner.trained_adapters:
            # Hydra's methods call `set_adapter`, which would enable the adapters again. It returns
            # at once if its adapter is the active one.
            self.set_adapter(self.owner.trained_adapters[0])
        with self.owner.adapted.disable_adapter():
            # otherwise weights that FSDP2 gathers within the context would stay frozen
            self.restore_requires_grad()
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
        """Activate one adapter until another one is set. The backward pass needs it as well.

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
            folder: Folder that peft saved.
            name: Name to give the adapter.
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
        """Restore requires_grad: peft freezes all but the active adapter on each switch."""
        assert self.owner.adapted is not None
        for name in self.owner.adapted.peft_config:
            self.owner.adapted.set_requires_grad(name, name in self.owner.trained_adapters)

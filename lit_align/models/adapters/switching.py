"""Which of a network's adapters is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lit_align.models.weights.loading import check_base, check_task
from lit_align.models.weights.sharded_loading import light


class Wearer(nn.Module):
    """A network that puts adapters on and off; what it is, `Backbone` says."""

    network: PreTrainedModel
    adapted: PeftModel | None  # peft's view of the network
    trained_adapters: list[str]
    name: str  # for people
    task: str  # peft's name of it

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base alone: what the network was before an adapter learnt anything."""
        if self.adapted is None:
            yield
            return
        with self.adapted.disable_adapter():
            self.thaw()  # peft froze all: weights gathered now, under FSDP2, would stay frozen
            yield
        self.thaw()

    def lend(self, folder: str, adapter: str) -> None:
        """Takes in a frozen adapter that was trained on this very base; it is not put on.

        Args:
            folder: As peft saved it.
            adapter: Its name from now on.
        """
        check_base(folder, self.name)
        check_task(folder, self.task)
        with light(self.network):
            if self.adapted is None:
                self.adapted = PeftModel.from_pretrained(self.network, folder, adapter_name=adapter)
            else:
                self.adapted.load_adapter(folder, adapter_name=adapter)
        self.thaw()

    def wear(self, adapter: str) -> None:
        """Switches to one adapter, until another is asked for: backward needs it, too.

        Args:
            adapter: Its name in peft.
        """
        assert self.adapted is not None
        if self.adapted.active_adapter != adapter:
            self.adapted.set_adapter(adapter)
            self.thaw()

    @contextmanager
    def wearing(self, adapter: str) -> Iterator[None]:
        """One adapter for a while without gradients, then the one that was on before."""
        assert self.adapted is not None
        before = self.adapted.active_adapter
        self.wear(adapter)
        yield
        self.wear(before)

    def thaw(self) -> None:
        """Lets all adapters train that shall; on any switch, peft freezes all but the active."""
        assert self.adapted is not None
        for name in self.adapted.peft_config:
            self.adapted.set_requires_grad(name, name in self.trained_adapters)

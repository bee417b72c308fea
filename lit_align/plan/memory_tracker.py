"""Who holds how many bytes, where and for what, and the most of each phase."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._tools.common_utils import get_untyped_storages


class Kind(StrEnum):
    """What bytes are for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    STATE = "optimizer state"
    ACTIVATIONS = "activations"  # made in passes with gradients, and held for backward
    TEMPORARIES = "logits, temporaries"  # made in passes without, or in backward; and the batch
    CACHE = "KV cache"
    GATHERED = "gathered"  # other ranks' shares of weights, and buffers of collectives


class Place(StrEnum):
    """Where bytes are."""

    DEVICE = "device"
    HOST = "host"


class Height(NamedTuple):
    """The most bytes of a phase in one place.

    Args:
        total: Bytes.
        by_kind: The same, by what they are for.
        moment: What was computed then.
    """

    total: int
    by_kind: dict[Kind, int]
    moment: str


Moment = tuple[Any, bool, bool]  # what was computed, in a backward or not, with gradients or not
Moments = dict[Moment, Height]  # the most of the device at each


class Block:
    """A storage that is there.

    Args:
        size: Bytes.
        kind: What for.
        place: Where.
        weak: Tells when the storage is gone.
    """

    __slots__ = ("kind", "place", "size", "weak")

    def __init__(
        self, size: int, kind: Kind, place: Place, weak: weakref.ref[torch.UntypedStorage]
    ):
        self.size, self.kind, self.place, self.weak = size, kind, place, weak


class Ledger:
    """Counts storages while they live; a watcher of an algorithm's phases.

    Args:
        rounded: Bytes that an allocator counts for a block of so many.
    """

    def __init__(self, rounded: Callable[[int], int] = int):
        self.rounded = rounded
        self.blocks: dict[int, Block] = {}  # by the storage's identity
        self.held: dict[Place, Counter[Kind]] = {place: Counter() for place in Place}
        self.total: dict[Place, int] = dict.fromkeys(Place, 0)
        self.blind = False  # whether what is made now takes no bytes
        self.new: tuple[Place, Kind | None] = (Place.DEVICE, None)  # what is made now
        self.heights: dict[str, dict[Place, Height]] = {}
        self.moments: dict[str, Moments] = {}  # by phase, the most at each of its moments
        self.most: dict[Place, Height] = {}
        self.begin("load")

    # Phases --------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """A phase starts: the highest so far is what is there."""
        self.phase = phase
        self.most = {place: self.height(place) for place in Place}
        self.most_at: Moments = {("", False, False): self.most[Place.DEVICE]}

    def end(self, phase: str) -> None:
        """Keeps the phase's heights, where they are the largest."""
        known = self.heights.setdefault(phase, dict(self.most))
        for place, height in self.most.items():
            if height.total > known[place].total:
                known[place] = height
        moments = self.moments.setdefault(self.phase, {})
        for moment, height in self.most_at.items():
            if moment not in moments or height.total > moments[moment].total:
                moments[moment] = height

    def height(self, place: Place, function: Any = "", inside: int = 0) -> Height:
        """What is there now; `note` explains the arguments."""
        by_kind = dict(self.held[place])
        by_kind[Kind.TEMPORARIES] = by_kind.get(Kind.TEMPORARIES, 0) + inside
        backward = torch._C._current_graph_task_id() != -1
        way = "backward" if backward else "forward" if torch.is_grad_enabled() else "no gradients"
        return Height(self.total[place] + inside, by_kind, f"{function}, {way}" if function else "")

    def note(self, function: Any, inside: int = 0) -> None:
        """Notes what is there now, if it is the most of the phase.

        Args:
            function: What has just been computed.
            inside: Bytes that it has taken and given back.
        """
        for place, most in self.most.items():
            if self.total[place] + inside > most.total:
                self.most[place] = self.height(place, function, inside)
        backward = torch._C._current_graph_task_id() != -1
        moment, known = (function, backward, torch.is_grad_enabled()), self.most_at
        if moment not in known or self.total[Place.DEVICE] + inside > known[moment].total:
            known[moment] = self.height(Place.DEVICE, function, inside)

    # Storages ------------------------------------------------------------------------------------

    def see(self, storage: torch.UntypedStorage, kind: Kind) -> bool:
        """Counts a storage from now on; whether it is a new one.

        Args:
            storage: Any.
            kind: What it is for, unless something else is being made.
        """
        key = id(storage)
        if key in self.blocks:
            return False
        weak = weakref.ref(storage, lambda _: self.gone(key))
        place, told = self.new
        self.blocks[key] = block = Block(0, told or kind, place, weak)
        self.resize(block, 0 if self.blind else storage.nbytes())
        return True

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made inside takes no bytes."""
        self.blind = True
        try:
            yield
        finally:
            self.blind = False

    def gone(self, key: int) -> None:
        """A storage is no more."""
        self.resize(self.blocks.pop(key), 0)

    def resize(self, block: Block, size: int) -> None:
        """A storage has so many bytes from now on."""
        rounded = self.rounded(size)
        self.held[block.place][block.kind] += rounded - block.size
        self.total[block.place] += rounded - block.size
        block.size = rounded

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has been emptied or filled."""
        block = self.blocks.get(id(storage))
        if block is not None:
            self.resize(block, storage.nbytes())
            self.note("resize")

    def tell(self, tensor: Tensor, kind: Kind | None = None, place: Place | None = None) -> None:
        """Says what a tensor is for, or where it is now.

        Args:
            tensor: A plain one, or a subclass that consists of some.
            kind: If it is another than so far.
            place: If it is another than so far.
        """
        for storage in get_untyped_storages(tensor):
            self.see(storage, kind or Kind.TEMPORARIES)
            block = self.blocks[id(storage)]
            size = block.size
            self.resize(block, 0)
            block.kind, block.place = kind or block.kind, place or block.place
            self.resize(block, size)

    def empty(self, tensor: Tensor) -> None:
        """A tensor's memory is given back while the tensor stays: it sleeps elsewhere."""
        for storage in get_untyped_storages(tensor):
            self.see(storage, Kind.PARAMETERS)
            self.resize(self.blocks[id(storage)], 0)

    def fill(self, tensor: Tensor) -> None:
        """It is there again."""
        for storage in get_untyped_storages(tensor):
            self.resize(self.blocks[id(storage)], storage.nbytes())
        self.note("wake")

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


class MemoryKind(StrEnum):
    """What bytes are for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    STATE = "optimizer state"
    ACTIVATIONS = "activations"  # made in passes with gradients, and held for backward
    TEMPORARIES = "logits, temporaries"  # made in passes without, or in backward; and the batch
    CACHE = "KV cache"
    GATHERED = "gathered"  # other ranks' shares of weights, and buffers of collectives


class MemoryLocation(StrEnum):
    """Where bytes are."""

    DEVICE = "device"
    HOST = "host"


class EstimatedPeak(NamedTuple):
    """The most bytes of a phase in one place.

    Args:
        total: Bytes.
        by_kind: The same, by what they are for.
        operation: What was computed then.
    """

    total: int
    by_kind: dict[MemoryKind, int]
    operation: str


OpContext = tuple[Any, bool, bool]  # what was computed, in a backward or not, with gradients or not
PeaksByContext = dict[OpContext, EstimatedPeak]  # the most of the device at each


class TrackedStorage:
    """A storage that is there.

    Args:
        size: Bytes.
        kind: What for.
        location: Where.
        storage_ref: Tells when the storage is gone.
    """

    __slots__ = ("kind", "location", "size", "storage_ref")

    def __init__(
        self,
        size: int,
        kind: MemoryKind,
        location: MemoryLocation,
        storage_ref: weakref.ref[torch.UntypedStorage],
    ):
        self.size, self.kind, self.location, self.storage_ref = size, kind, location, storage_ref


class MemoryTracker:
    """Counts storages while they live; a watcher of an algorithm's phases.

    Args:
        round_size: Bytes that an allocator counts for a block of so many.
    """

    def __init__(self, round_size: Callable[[int], int] = int):
        self.round_size = round_size
        self.blocks: dict[int, TrackedStorage] = {}  # by the storage's identity
        self.bytes_by_kind: dict[MemoryLocation, Counter[MemoryKind]] = {
            location: Counter() for location in MemoryLocation
        }
        self.total: dict[MemoryLocation, int] = dict.fromkeys(MemoryLocation, 0)
        self.is_ignoring = False  # whether what is made now takes no bytes
        self.target: tuple[MemoryLocation, MemoryKind | None] = (
            MemoryLocation.DEVICE,
            None,
        )  # what is made now
        self.peaks: dict[str, dict[MemoryLocation, EstimatedPeak]] = {}
        self.peaks_by_context: dict[
            str, PeaksByContext
        ] = {}  # by phase, the most at each of its moments
        self.phase_peaks: dict[MemoryLocation, EstimatedPeak] = {}
        self.begin("load")

    # Phases --------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """A phase starts: the highest so far is what is there."""
        self.phase = phase
        self.phase_peaks = {location: self.current_peak(location) for location in MemoryLocation}
        self.phase_peaks_by_context: PeaksByContext = {
            ("", False, False): self.phase_peaks[MemoryLocation.DEVICE]
        }

    def end(self, phase: str) -> None:
        """Keeps the phase's peaks, where they are the largest."""
        known = self.peaks.setdefault(phase, dict(self.phase_peaks))
        for location, peak in self.phase_peaks.items():
            if peak.total > known[location].total:
                known[location] = peak
        peaks = self.peaks_by_context.setdefault(self.phase, {})
        for context, peak in self.phase_peaks_by_context.items():
            if context not in peaks or peak.total > peaks[context].total:
                peaks[context] = peak

    def current_peak(
        self, location: MemoryLocation, function: Any = "", scratch_bytes: int = 0
    ) -> EstimatedPeak:
        """What is there now; `note` explains the arguments."""
        by_kind = dict(self.bytes_by_kind[location])
        by_kind[MemoryKind.TEMPORARIES] = by_kind.get(MemoryKind.TEMPORARIES, 0) + scratch_bytes
        backward = torch._C._current_graph_task_id() != -1
        mode = "backward" if backward else "forward" if torch.is_grad_enabled() else "no gradients"
        return EstimatedPeak(
            self.total[location] + scratch_bytes, by_kind, f"{function}, {mode}" if function else ""
        )

    def update_peaks(self, function: Any, scratch_bytes: int = 0) -> None:
        """Notes what is there now, if it is the most of the phase.

        Args:
            function: What has just been computed.
            scratch_bytes: Bytes that it has taken and given back.
        """
        for location, peak in self.phase_peaks.items():
            if self.total[location] + scratch_bytes > peak.total:
                self.phase_peaks[location] = self.current_peak(location, function, scratch_bytes)
        backward = torch._C._current_graph_task_id() != -1
        context, known = (function, backward, torch.is_grad_enabled()), self.phase_peaks_by_context
        if (
            context not in known
            or self.total[MemoryLocation.DEVICE] + scratch_bytes > known[context].total
        ):
            known[context] = self.current_peak(MemoryLocation.DEVICE, function, scratch_bytes)

    # Storages ------------------------------------------------------------------------------------

    def track(self, storage: torch.UntypedStorage, kind: MemoryKind) -> bool:
        """Counts a storage from now on; whether it is a new one.

        Args:
            storage: Any.
            kind: What it is for, unless something else is being made.
        """
        key = id(storage)
        if key in self.blocks:
            return False
        storage_ref = weakref.ref(storage, lambda _: self.forget(key))
        location, target_kind = self.target
        self.blocks[key] = block = TrackedStorage(0, target_kind or kind, location, storage_ref)
        self.resize(block, 0 if self.is_ignoring else storage.nbytes())
        return True

    @contextmanager
    def ignore_allocations(self) -> Iterator[None]:
        """What is made scratch_bytes takes no bytes."""
        self.is_ignoring = True
        try:
            yield
        finally:
            self.is_ignoring = False

    def forget(self, key: int) -> None:
        """A storage is no more."""
        self.resize(self.blocks.pop(key), 0)

    def resize(self, block: TrackedStorage, size: int) -> None:
        """A storage has so many bytes from now on."""
        num_bytes = self.round_size(size)
        self.bytes_by_kind[block.location][block.kind] += num_bytes - block.size
        self.total[block.location] += num_bytes - block.size
        block.size = num_bytes

    def update_size(self, storage: torch.UntypedStorage) -> None:
        """A storage has been emptied or filled."""
        block = self.blocks.get(id(storage))
        if block is not None:
            self.resize(block, storage.nbytes())
            self.update_peaks("resize")

    def label(
        self, tensor: Tensor, kind: MemoryKind | None = None, location: MemoryLocation | None = None
    ) -> None:
        """Says what a tensor is for, or where it is now.

        Args:
            tensor: A plain one, or a subclass that consists of some.
            kind: If it is another than so far.
            location: If it is another than so far.
        """
        for storage in get_untyped_storages(tensor):
            self.track(storage, kind or MemoryKind.TEMPORARIES)
            block = self.blocks[id(storage)]
            size = block.size
            self.resize(block, 0)
            block.kind, block.location = kind or block.kind, location or block.location
            self.resize(block, size)

    def release(self, tensor: Tensor) -> None:
        """A tensor's memory is given back while the tensor stays: it sleeps elsewhere."""
        for storage in get_untyped_storages(tensor):
            self.track(storage, MemoryKind.PARAMETERS)
            self.resize(self.blocks[id(storage)], 0)

    def restore(self, tensor: Tensor) -> None:
        """It is there again."""
        for storage in get_untyped_storages(tensor):
            self.resize(self.blocks[id(storage)], storage.nbytes())
        self.update_peaks("wake")

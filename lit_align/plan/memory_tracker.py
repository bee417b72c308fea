"""Memory tracker: bytes of live storages by location and kind, and the peak of each phase."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._tools.common_utils import get_untyped_storages  # private, torch 2.13


class MemoryKind(StrEnum):
    """Kind of the data in a storage."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    STATE = "optimizer state"
    ACTIVATIONS = "activations"  # results of passes with gradients, some kept for backward
    TEMPORARIES = "logits, temporaries"  # other results, also of backward, and the batch
    CACHE = "KV cache"
    GATHERED = "gathered"  # weights of other ranks, and buffers of collectives


class MemoryLocation(StrEnum):
    """Location of a storage."""

    DEVICE = "device"
    HOST = "host"


class EstimatedPeak(NamedTuple):
    """Peak memory of a phase in one location.

    Args:
        total: Bytes.
        by_kind: Bytes by kind; the sum is `total`.
        operation: Operator at the peak, and the pass it belongs to.
    """

    total: int
    by_kind: dict[MemoryKind, int]
    operation: str


OpContext = tuple[Any, bool, bool]  # operator, True in backward, True with gradients
PeaksByContext = dict[OpContext, EstimatedPeak]  # peak of the device at each operator


class TrackedStorage:
    """A live storage.

    Args:
        size: Bytes, rounded as the allocator does.
        kind: Kind of the data.
        location: Location of the storage.
        storage_ref: Weak reference that reports the end of the storage.
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
    """Tracker of live storages. It listens to the phases of an algorithm.

    Args:
        round_size: Function that returns the bytes an allocator counts for a block. Default: the
            size itself.

    Example:
        >>> tracker, tensor = MemoryTracker(), torch.zeros(25)
        >>> tracker.track(tensor.untyped_storage(), MemoryKind.STATE)
        True
        >>> tracker.total[MemoryLocation.DEVICE]
        100
    """

    def __init__(self, round_size: Callable[[int], int] = int):
        self.round_size = round_size
        self.blocks: dict[int, TrackedStorage] = {}  # by `id` of the storage
        self.bytes_by_kind: dict[MemoryLocation, Counter[MemoryKind]] = {
            location: Counter() for location in MemoryLocation
        }
        self.total: dict[MemoryLocation, int] = dict.fromkeys(MemoryLocation, 0)
        self.is_ignoring = False  # True while new storages count 0 bytes
        # Location and kind of new storages. Without a kind, the caller of `track` gives it.
        self.target: tuple[MemoryLocation, MemoryKind | None] = (MemoryLocation.DEVICE, None)
        self.peaks: dict[str, dict[MemoryLocation, EstimatedPeak]] = {}  # by phase
        self.peaks_by_context: dict[str, PeaksByContext] = {}  # by phase
        self.phase_peaks: dict[MemoryLocation, EstimatedPeak] = {}  # of the current phase
        self.begin("load")

    # Phases --------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Start a phase. Its first peak is the memory that is in use now.

        Args:
            phase: Name of the phase.
        """
        self.phase = phase
        self.phase_peaks = {location: self.current_peak(location) for location in MemoryLocation}
        self.phase_peaks_by_context: PeaksByContext = {
            ("", False, False): self.phase_peaks[MemoryLocation.DEVICE]
        }

    def end(self, phase: str) -> None:
        """End a phase and keep its peaks if they are the largest so far.

        Args:
            phase: Name of the phase.
        """
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
        """Return the memory that is in use now.

        Args:
            location: Location to report.
            function: Operator that was run. Default: none.
            scratch_bytes: Bytes that the operator has allocated and freed inside.
        """
        by_kind = dict(self.bytes_by_kind[location])
        by_kind[MemoryKind.TEMPORARIES] = by_kind.get(MemoryKind.TEMPORARIES, 0) + scratch_bytes
        # Private to torch (checked with 2.13): -1 outside of a backward pass.
        backward = torch._C._current_graph_task_id() != -1
        mode = "backward" if backward else "forward" if torch.is_grad_enabled() else "no gradients"
        return EstimatedPeak(
            self.total[location] + scratch_bytes, by_kind, f"{function}, {mode}" if function else ""
        )

    def update_peaks(self, function: Any, scratch_bytes: int = 0) -> None:
        """Record the memory that is in use now if it is the peak of the phase.

        Args:
            function: Operator that was run.
            scratch_bytes: Bytes that the operator has allocated and freed inside.
        """
        for location, peak in self.phase_peaks.items():
            if self.total[location] + scratch_bytes > peak.total:
                self.phase_peaks[location] = self.current_peak(location, function, scratch_bytes)
        # Also keep a peak per operator. The operator at the peak can change with the number of
        # blocks.
        backward = torch._C._current_graph_task_id() != -1
        context, known = (function, backward, torch.is_grad_enabled()), self.phase_peaks_by_context
        in_use = self.total[MemoryLocation.DEVICE] + scratch_bytes
        if context not in known or in_use > known[context].total:
            known[context] = self.current_peak(MemoryLocation.DEVICE, function, scratch_bytes)

    # Storages ------------------------------------------------------------------------------------

    def track(self, storage: torch.UntypedStorage, kind: MemoryKind) -> bool:
        """Count a storage until it is freed.

        Args:
            storage: Storage of a tensor.
            kind: Kind of the data, if `target` has no kind.

        Returns:
            True if the storage was not tracked before.
        """
        key = id(storage)
        if key in self.blocks:
            return False
        # Called when the storage is freed, before its id can belong to another one.
        storage_ref = weakref.ref(storage, lambda _: self.forget(key))
        location, target_kind = self.target
        self.blocks[key] = block = TrackedStorage(0, target_kind or kind, location, storage_ref)
        self.resize(block, 0 if self.is_ignoring else storage.nbytes())
        return True

    @contextmanager
    def ignore_allocations(self) -> Iterator[None]:
        """Count 0 bytes for storages that are created inside the block."""
        self.is_ignoring = True
        try:
            yield
        finally:
            self.is_ignoring = False

    def forget(self, key: int) -> None:
        """Remove a storage that was freed.

        Args:
            key: `id` of the storage.
        """
        self.resize(self.blocks.pop(key), 0)

    def resize(self, block: TrackedStorage, size: int) -> None:
        """Change the number of bytes of a storage.

        Args:
            block: The storage.
            size: New number of bytes.
        """
        num_bytes = self.round_size(size)
        self.bytes_by_kind[block.location][block.kind] += num_bytes - block.size
        self.total[block.location] += num_bytes - block.size
        block.size = num_bytes

    def update_size(self, storage: torch.UntypedStorage) -> None:
        """Read the size of a storage again: FSDP2 empties and fills storages in place.

        Args:
            storage: Storage whose size has changed.
        """
        block = self.blocks.get(id(storage))
        if block is not None:
            self.resize(block, storage.nbytes())
            self.update_peaks("resize")

    def label(
        self, tensor: Tensor, kind: MemoryKind | None = None, location: MemoryLocation | None = None
    ) -> None:
        """Change the kind or the location of a tensor.

        Args:
            tensor: Plain tensor, or a subclass that consists of several.
            kind: New kind. None keeps the current one.
            location: New location. None keeps the current one.
        """
        for storage in get_untyped_storages(tensor):
            self.track(storage, kind or MemoryKind.TEMPORARIES)
            block = self.blocks[id(storage)]
            size = block.size
            # To 0 and back, so that the old and the new counter both change.
            self.resize(block, 0)
            block.kind, block.location = kind or block.kind, location or block.location
            self.resize(block, size)

    def release(self, tensor: Tensor) -> None:
        """Count 0 bytes for a tensor that is offloaded.

        Args:
            tensor: Tensor whose values are on the host.
        """
        for storage in get_untyped_storages(tensor):
            self.track(storage, MemoryKind.PARAMETERS)
            self.resize(self.blocks[id(storage)], 0)

    def restore(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor that is reloaded.

        Args:
            tensor: Tensor that was released before.
        """
        for storage in get_untyped_storages(tensor):
            self.resize(self.blocks[id(storage)], storage.nbytes())
        self.update_peaks("reload")

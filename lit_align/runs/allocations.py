"""Peak bytes of a device, counted by its allocator."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.profiler import ProfilerActivity, profile


class Allocations(ABC):
    """Counter of the most bytes in use between `begin` and `end`."""

    @abstractmethod
    def begin(self) -> None:
        """Reset the peak to the bytes in use now."""

    @abstractmethod
    def end(self) -> int:
        """Return the most bytes in use since `begin`."""

    def start(self) -> None:  # noqa: B027
        """Start to count. Does nothing if the allocator always counts."""

    def stop(self) -> None:  # noqa: B027
        """Stop counting. Does nothing if the allocator always counts."""

    def raise_floor(self, known_bytes: int) -> None:  # noqa: B027
        """Correct the count for memory that was allocated before `start`.

        Args:
            known_bytes: Bytes that are certainly in use.
        """


class AcceleratorAllocations(Allocations):
    """Counters of an accelerator's caching allocator, which always run.

    Args:
        device: Device of the allocator.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """Reset the allocator's peak."""
        torch.accelerator.reset_peak_memory_stats(self.device)

    def end(self) -> int:
        """Return the allocator's peak in bytes."""
        return torch.accelerator.max_memory_allocated(self.device)


class CPUAllocations(Allocations):
    """Exact count of the CPU allocator's blocks, from the events of torch's profiler.

    torch has no counters for a CPU. Tensors saved by autograd and temporaries inside of operators
    are counted, views are not. Memory of Python, of libraries and of other threads is not counted.
    A block may be freed in a later session of the profiler than it was allocated in.
    """

    def __init__(self) -> None:
        self.bytes_in_use = 0  # allocated minus freed bytes of all events so far
        self.session: profile | None = None

    def begin(self) -> None:
        """Reset the peak to the bytes in use now."""
        self.snapshot()

    def end(self) -> int:
        """Return the most bytes in use since `begin`."""
        return self.snapshot()

    def snapshot(self) -> int:
        """Return the most bytes in use in the current session, and start the next session."""
        # garbage collection between two sessions would free tensors without an event
        was_collecting = gc.isenabled()
        gc.disable()
        old = self.session
        if old is not None:
            old.stop()
            self.session = start_profiler()
        if was_collecting:
            gc.enable()
        peak = self.bytes_in_use
        for change in allocation_changes(old):
            self.bytes_in_use += change
            peak = max(peak, self.bytes_in_use)
        return peak

    def start(self) -> None:
        """Start a session of the profiler, unless one runs."""
        if self.session is None:
            # Collect garbage first. Otherwise uncounted blocks are freed during the session and
            # the count is negative.
            gc.collect()
            self.session = start_profiler()

    def stop(self) -> None:
        """End the session of the profiler."""
        if self.session is None:
            return
        gc.collect()  # before, so that the freed tensors are still counted
        self.snapshot()
        self.session.stop()
        self.session = None

    def raise_floor(self, known_bytes: int) -> None:
        """Set the bytes in use to `known_bytes` if fewer were counted."""
        self.snapshot()
        self.bytes_in_use = max(self.bytes_in_use, known_bytes)


def start_profiler() -> profile:
    """Return a started session of torch's profiler that records memory."""
    session = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    session.start()
    return session


def allocation_changes(session: profile | None) -> Iterator[int]:
    """Yield the bytes of each allocation (positive) and release (negative), in order."""
    if session is None or session.profiler is None or session.profiler.kineto_results is None:
        return
    # not documented by torch: attributes and event name were checked with torch 2.13
    for event in session.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of all storages on a device. Shared storages count once.

    Args:
        tensors: Plain tensors, or subclasses that wrap some: shards, quantized states.
        device: Device of the storages. Others, such as offloaded weights, are left out.

    Example:
        >>> tensor = torch.empty(100)  # 4 bytes each
        >>> storage_bytes([tensor, tensor[:3]], torch.device("cpu"))
        400
    """
    storages = {storage for tensor in tensors for storage in get_untyped_storages(tensor)}
    return sum(storage.nbytes() for storage in storages if storage.device == device)

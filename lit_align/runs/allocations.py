"""How many bytes of a device are in use, as its allocator counts them."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.profiler import ProfilerActivity, profile


class Allocations(ABC):
    """Counts what an allocator gives out and takes back, from one moment to another."""

    @abstractmethod
    def begin(self) -> None:
        """Forgets the most bytes that were in use so far."""

    @abstractmethod
    def end(self) -> int:
        """The most bytes in use since `begin`."""

    def start(self) -> None:  # noqa: B027
        """Listens again; where listening costs nothing, it never stops."""

    def stop(self) -> None:  # noqa: B027
        """Stops listening."""

    def raise_floor(self, known_bytes: int) -> None:  # noqa: B027
        """Corrects the count where memory was given out before anyone listened.

        Args:
            known_bytes: Bytes that are in use for sure.
        """


class AcceleratorAllocations(Allocations):
    """The counters of an accelerator's caching allocator, which always run.

    Args:
        device: Whose.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """Sets the allocator's high-water mark back."""
        torch.accelerator.reset_peak_memory_stats(self.device)

    def end(self) -> int:
        """The allocator's high-water mark."""
        return torch.accelerator.max_memory_allocated(self.device)


class CPUAllocations(Allocations):
    """The CPU allocator's own events: each block of tensor memory, in and out, to the byte.

    torch keeps no such counters for a CPU, but tells its profiler. Views, tensors that autograd
    saves and temporaries inside of operators are counted as what they are, blocks that somebody
    holds; Python's and the libraries' memory is not, nor what other threads allocate. A session
    that frees what an earlier one has seen given out counts it as freed.
    """

    def __init__(self) -> None:
        self.bytes_in_use = 0  # bytes, net of all that was heard
        self.session: profile | None = None

    def begin(self) -> None:
        """Starts counting anew."""
        self.snapshot()

    def end(self) -> int:
        """The most bytes in use since `begin`."""
        return self.snapshot()

    def snapshot(self) -> int:
        """Ends a session of the profiler and starts the next; the most bytes in use in the old."""
        # a collection between the two would free tensors that nobody hears of
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
        """Starts a session, if none is under way; garbage of before is not heard going."""
        if self.session is None:
            gc.collect()
            self.session = start_profiler()

    def stop(self) -> None:
        """Ends the session; garbage that holds tensors is collected while it is still heard."""
        if self.session is None:
            return
        gc.collect()
        self.snapshot()
        self.session.stop()
        self.session = None

    def raise_floor(self, known_bytes: int) -> None:
        """Adds what is missing to what is known to be there."""
        self.snapshot()
        self.bytes_in_use = max(self.bytes_in_use, known_bytes)


def start_profiler() -> profile:
    """A session of the profiler that hears of memory."""
    session = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    session.start()
    return session


def allocation_changes(session: profile | None) -> Iterator[int]:
    """Bytes that the CPU's allocator gave out (above 0) and took back, in their order."""
    if session is None or session.profiler is None or session.profiler.kineto_results is None:
        return
    for event in session.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of storage on a device, each storage once however many tensors share it.

    Args:
        tensors: Plain ones, or subclasses that consist of some: shards, quantized states.
        device: What lies elsewhere, such as a parked network, is left out.
    """
    storages = {storage for tensor in tensors for storage in get_untyped_storages(tensor)}
    return sum(storage.nbytes() for storage in storages if storage.device == device)

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

    def resume(self) -> None:  # noqa: B027
        """Listens again; where listening costs nothing, it never stops."""

    def pause(self) -> None:  # noqa: B027
        """Stops listening."""

    def at_least(self, known: int) -> None:  # noqa: B027
        """Corrects the count where memory was given out before anyone listened.

        Args:
            known: Bytes that are in use for sure.
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
        self.used = 0  # bytes, net of all that was heard
        self.session: profile | None = None

    def begin(self) -> None:
        """Starts counting anew."""
        self.hear()

    def end(self) -> int:
        """The most bytes in use since `begin`."""
        return self.hear()

    def hear(self) -> int:
        """Ends a session of the profiler and starts the next; the most bytes in use in the old."""
        # a collection between the two would free tensors that nobody hears of
        collecting = gc.isenabled()
        gc.disable()
        old = self.session
        if old is not None:
            old.stop()
            self.session = started()
        if collecting:
            gc.enable()
        most = self.used
        for change in changes(old):
            self.used += change
            most = max(most, self.used)
        return most

    def resume(self) -> None:
        """Starts a session, if none is under way; garbage of before is not heard going."""
        if self.session is None:
            gc.collect()
            self.session = started()

    def pause(self) -> None:
        """Ends the session; garbage that holds tensors is collected while it is still heard."""
        if self.session is None:
            return
        gc.collect()
        self.hear()
        self.session.stop()
        self.session = None

    def at_least(self, known: int) -> None:
        """Adds what is missing to what is known to be there."""
        self.hear()
        self.used = max(self.used, known)


def started() -> profile:
    """A session of the profiler that hears of memory."""
    session = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    session.start()
    return session


def changes(session: profile | None) -> Iterator[int]:
    """Bytes that the CPU's allocator gave out (above 0) and took back, in their order."""
    if session is None or session.profiler is None or session.profiler.kineto_results is None:
        return
    for event in session.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()


def bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of storage on a device, each storage once however many tensors share it.

    Args:
        tensors: Plain ones, or subclasses that consist of some: shards, quantised states.
        device: What lies elsewhere, such as a parked network, is left out.
    """
    storages = {storage for tensor in tensors for storage in get_untyped_storages(tensor)}
    return sum(storage.nbytes() for storage in storages if storage.device == device)

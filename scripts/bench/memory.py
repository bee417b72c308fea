"""Peak memory of a process of its own, above what it began with."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def run_in_fork(work: Callable[..., Result], *args: Any) -> Result:
    """Return the result of `work` in a fork of this process, which has its imports."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run_and_send() -> None:
        torch.set_num_threads(1)
        sender.send(work(*args))

    child = context.Process(target=run_and_send)
    child.start()
    sender.close()
    try:
        result: Result = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} of {args} died") from None
    child.join()
    return result


def peak(work: Callable[[], None], device: str) -> int:
    """Return the peak bytes of `work` above those of the process before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024

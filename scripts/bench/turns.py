"""Runs that take turns, a step each, so that a busy moment of the machine strikes all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

AfterStep = Callable[[], None]
Runner = Callable[[int, AfterStep], None]  # makes so many steps and calls after each


class Step(NamedTuple):
    """What a step took.

    Args:
        clock: Seconds.
        work: Seconds that this process had a processor.
        bytes: Of this run on a GPU at most, 0 elsewhere.
    """

    clock: float
    work: float
    bytes: int


class RunThread:
    """A run in a thread of its own that makes one step whenever it is told to.

    Args:
        run: What makes the steps.
        steps: How many.
    """

    def __init__(self, run: Runner, steps: int):
        self.resume, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.held = 0  # bytes on a GPU that this run has between its turns
        self.thread = threading.Thread(target=self.work, args=(run, steps), daemon=True)
        self.thread.start()

    def work(self, run: Runner, steps: int) -> None:
        """The thread's life."""
        torch.set_num_threads(1)
        self.resume.acquire()
        try:
            run(steps, self.after_step)
        except BaseException as error:  # the main thread raises it
            self.error = error
        self.done.release()

    def after_step(self) -> None:
        """The run calls it after each step, and waits here for its next turn."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.done.release()
        self.resume.acquire()

    def step(self) -> Step:
        """What the next step takes."""
        before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        others = before - self.held
        if before:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter(), time.process_time()
        self.resume.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        clock, work = time.perf_counter() - start[0], time.process_time() - start[1]
        if not torch.cuda.is_initialized():
            return Step(clock, work, 0)
        self.held += torch.cuda.memory_allocated() - before
        return Step(clock, work, torch.cuda.max_memory_allocated() - others)


def interleave_steps(runs: Sequence[Runner], rounds: int) -> list[list[Step]]:
    """Each step of each run; the first step of each, with all loading, is left out."""
    turns = [RunThread(run, rounds + 1) for run in runs]
    spent: list[list[Step]] = [[] for _ in runs]
    for turn in turns:
        turn.step()
    for number in range(rounds):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for which in order:
            spent[which].append(turns[which].step())
    for turn in turns:
        turn.step()  # lets it end
        turn.thread.join()
    return spent

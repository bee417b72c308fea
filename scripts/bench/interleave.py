"""Interleaved runs: one step of each in turn, so that other processes slow all of them equally."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

AfterStep = Callable[[], None]
Runner = Callable[[int, AfterStep], None]  # runs that many steps, and a function after each


class Step(NamedTuple):
    """Measurement of a step.

    Args:
        clock: Wall-clock seconds.
        work: CPU seconds of this process.
        bytes: Peak bytes of this run on a GPU, 0 on a CPU.
    """

    clock: float
    work: float
    bytes: int


class RunThread:
    """Run in its own thread that waits after each step.

    Args:
        run: Function that runs the steps.
        steps: Number of steps.
    """

    def __init__(self, run: Runner, steps: int):
        self.resume, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.held = 0  # bytes on a GPU that this run has between its steps
        self.thread = threading.Thread(target=self.work, args=(run, steps), daemon=True)
        self.thread.start()

    def work(self, run: Runner, steps: int) -> None:
        """Run all steps; the body of the thread.

        Args:
            run: Function that runs the steps.
            steps: Number of steps.
        """
        torch.set_num_threads(1)
        self.resume.acquire()
        try:
            run(steps, self.after_step)
        except BaseException as error:  # the main thread raises it
            self.error = error
        self.done.release()

    def after_step(self) -> None:
        """Wait for the next call of `step`. The run calls this after each step."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.done.release()
        self.resume.acquire()

    def step(self) -> Step:
        """Run the next step and return its measurement."""
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
    """Return the measurements of each run, without its first step, which includes loading.

    Args:
        runs: Functions that run the steps.
        rounds: Number of steps to measure.
    """
    threads = [RunThread(run, rounds + 1) for run in runs]
    measured: list[list[Step]] = [[] for _ in runs]
    for thread in threads:
        thread.step()
    for number in range(rounds):
        # In alternating order, so that no run is always after the same one.
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for index in order:
            measured[index].append(threads[index].step())
    for thread in threads:
        thread.step()  # returns when the run has ended
        thread.thread.join()
    return measured

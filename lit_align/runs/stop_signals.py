"""Signals that end a run: it saves at the end of the iteration and exits."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Handlers of SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C that only record the signal.

    A second Ctrl-C stops at once. Lightning's own handlers are replaced: its SLURM handler saves
    in the middle of an iteration, and its SIGTERM handler may start a collective at any
    point of the code.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.previous_handlers: dict[int, Any] = {}  # by signal number

    def install(self) -> None:
        """Install the handlers. Python allows this only in the main thread."""
        if not self.previous_handlers and threading.current_thread() is threading.main_thread():
            self.received = None
            self.previous_handlers = {
                number: signal.signal(number, self.handle) for number in STOP_SIGNALS
            }

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal and print what happens next.

        Args:
            number: Number of the signal.
            frame: Interrupted frame, unused.
        """
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number)
        again = " (press again to stop at once)" if number == signal.SIGINT else ""
        text = f"{self.received.name}: saving at the end of this iteration{again}\n"
        os.write(2, text.encode())  # print is not safe here: the signal may interrupt a print

    def requeue(self, trainer: Trainer) -> None:
        """Requeue a SLURM job after its warning, as Lightning's own handler does."""
        strategy = trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        environment = strategy.cluster_environment if parallel else None
        should_requeue = (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and self.received == environment.requeue_signal
        )
        if should_requeue and trainer.is_global_zero:
            job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
            name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
            subprocess.run(["scontrol", "requeue", name], check=False)

"""Signals that end a run: it saves at the next iteration's border and leaves."""

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
    """Notes SIGTERM, SIGUSR1 (SLURM's warnings) and Ctrl-C; a second Ctrl-C stops at once.

    Lightning's own handlers save in the middle of an iteration (SLURM's) or start a collective
    wherever the program is (SIGTERM): while this listens they are not asked.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.previous_handlers: dict[int, Any] = {}  # the handlers that were in place

    def install(self) -> None:
        """Takes the signals over; from the main thread alone, as Python wants it."""
        if not self.previous_handlers and threading.current_thread() is threading.main_thread():
            self.received = None
            self.previous_handlers = {
                number: signal.signal(number, self.handle) for number in STOP_SIGNALS
            }

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Comes whenever a signal arrives."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number)
        again = "; again to stop at once" if number == signal.SIGINT else ""
        text = f"{self.received.name}: saving at the end of this iteration{again}\n"
        os.write(2, text.encode())  # print could be interrupted inside itself

    def requeue(self, trainer: Trainer) -> None:
        """Puts a SLURM job back into the queue after its warning, as Lightning would have."""
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

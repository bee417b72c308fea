"""Callbacks for resume tests: send a signal inside an iteration, and log random numbers."""

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SignalAt(Callback):
    """Callback that sends signals to its own process.

    Args:
        name: Name of the signal.
        iteration: Iteration at whose start it is sent.
        times: Number of signals.
    """

    def __init__(self, name: str, iteration: int, times: int = 1):
        self.name, self.iteration, self.times = name, iteration, times

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if module.iteration == self.iteration and trainer.is_global_zero:
            for _ in range(self.times):
                self.send(signal.Signals[self.name])

    def send(self, number: signal.Signals) -> None:
        """Send a signal. SIGINT goes to the children too, as a terminal sends Ctrl-C."""
        os.killpg(0, number) if number == signal.SIGINT else os.kill(os.getpid(), number)


class RandomNumbers(Callback):
    """Callback that logs the sum of random numbers of Python, numpy and torch."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = random.random() + np.random.rand() + float(torch.rand(()))
        trainer.lightning_module.log("random_number", number)

"""A callback that sends the run a signal in the middle of an iteration."""

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SignalAt(Callback):
    """Sends signals to the process it is in.

    Args:
        name: Of the signal.
        iteration: In which it comes.
        times: How many are sent.
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
        """To this process; Ctrl-C goes to its children, too, as a terminal sends it."""
        os.killpg(0, number) if number == signal.SIGINT else os.kill(os.getpid(), number)


class Draws(Callback):
    """Logs the sum of a number of python's, one of numpy's and one of torch's."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = random.random() + np.random.rand() + float(torch.rand(()))
        trainer.lightning_module.log("drawn", number)

"""A few lines that say how a run goes; they read as well in a file as on a screen."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

SHOWN = (
    *("loss", "reward", "accuracy", "rewards/accuracies", "objective/kl", "entropy", "lr"),
    "memory/peak",
)
TRAINED = ("val/ratio", "val/clipfrac_avg")  # PPO's old names of what its updates measure


class Progress(Callback):
    """Prints the main metrics some twenty times over a run.

    Args:
        lines: Lines per fit, about; in a run without an end, steps per line.
        metrics: Which metrics to show, where an algorithm logs them.
    """

    def __init__(
        self,
        lines: int = 20,
        metrics: tuple[str, ...] = SHOWN,
    ):
        self.lines, self.metrics = lines, metrics
        self.started, self.steps = 0.0, 0

    def on_train_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Starts the clock."""
        self.started, self.steps = time.monotonic(), 0

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, algorithm: LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        """Prints a line every so many batches, and at the end of an epoch."""
        self.steps += 1
        total = trainer.estimated_stepping_batches  # infinite in a run without an end
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self.lines and math.isinf(total) and done % self.lines == 0:
            print(f"step {done}  {self.shown(trainer)}")
        elif self.lines and (done % max(total // self.lines, 1) == 0 or done == total):
            left = (time.monotonic() - self.started) / self.steps * (total - done)
            step = f"{done:>{len(str(total))}}/{total}"
            print(f"step {step}  {self.shown(trainer)}  {left:.0f} s left")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Prints what the validation measured."""
        if not trainer.sanity_checking:
            values = trainer.callback_metrics
            names = [name for name in values if name.startswith("val/") and name not in TRAINED]
            print("  ".join(f"{name} {float(values[name]):.4g}" for name in names))

    def shown(self, trainer: Trainer) -> str:
        """The metrics of the last step that this algorithm logs."""
        values = trainer.callback_metrics
        return "  ".join(f"{n} {float(values[n]):.4g}" for n in self.metrics if n in values)

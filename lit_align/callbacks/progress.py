"""Progress of a run: a few lines of metrics, and a live line on a terminal."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lit_align.algorithms.core.base import Algorithm

DEFAULT_METRICS = (
    *("loss", "reward", "accuracy", "rewards/accuracies", "kl/per_response_k1", "entropy", "lr"),
    "memory/peak",
)
BAR_WIDTH = 16  # characters


class Progress(Callback):
    """Print the main metrics about twenty times per run, and a bar on a terminal.

    A line ends with the tokens per second, the time of each phase in percent (if `Timing` measures
    them), and the remaining time. The bar shows the current phase and its progress, estimated from
    the previous iteration. Only the first rank prints.

    Args:
        lines_per_fit: Approximate number of lines per fit. In a run without an end: steps per
            line. 0 prints none.
        metrics: Metrics to show. Those that the algorithm does not log are left out.
    """

    def __init__(
        self,
        lines_per_fit: int = 20,
        metrics: tuple[str, ...] = DEFAULT_METRICS,
    ):
        self.lines_per_fit, self.metrics = lines_per_fit, metrics
        self.started, self.steps = 0.0, 0
        self.console = Console()
        self.live: Live | None = None
        self.head, self.tail = Text(), ""  # parts of the live line before and after the phases
        self.phase, self.phase_start = "", 0.0  # current phase and its start in seconds
        self.seconds: dict[str, float] = {}  # by phase, of the last iteration

    # When -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Start the clock, and the bar on a terminal."""
        self.started, self.steps = time.monotonic(), 0
        if trainer.is_global_zero and self.lines_per_fit and self.console.is_terminal:
            self.head = Text("starting  ")
            algorithm.phase_listeners.append(self)
            self.live = Live(console=self.console, get_renderable=self.render_line, transient=True)
            self.live.start()

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, algorithm: LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        """Print a line if it is due, and at the last step; update the bar."""
        self.steps += 1
        values = trainer.callback_metrics
        self.seconds = {k[5:]: float(v) for k, v in values.items() if k.startswith("time/")}
        total = trainer.estimated_stepping_batches  # infinite in a run without an end
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        seconds_left = (time.monotonic() - self.started) / self.steps * (total - done)
        position = f"{done:>{len(str(total))}}/{total}" if math.isfinite(total) else str(done)
        end = f"{format_duration(seconds_left)} left" if math.isfinite(seconds_left) else ""
        every = (
            self.lines_per_fit if math.isinf(total) else max(total // max(self.lines_per_fit, 1), 1)
        )
        if self.lines_per_fit and (done % every == 0 or done == total):
            parts = [
                f"step {position}",
                *self.format_metrics(trainer),
                *self.format_speed(trainer),
                end,
            ]
            self.console.print(
                "  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True
            )
        if self.live is not None:
            fraction = done / total if math.isfinite(total) else 0.0
            self.head = Text.assemble(f"step {position} ", *render_bar(fraction), "  ")
            self.tail = "  ".join(
                ["", end, *self.format_speed(trainer)[:1], *self.format_metrics(trainer)]
            )

    @rank_zero_only
    def on_validation_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Show the validation as the current phase."""
        self.begin("validation")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Print the metrics of a validation."""
        if not trainer.sanity_checking:
            values = trainer.callback_metrics
            names = [name for name in values if name.startswith("val/")]
            line = "  ".join(f"{name} {float(values[name]):.4g}" for name in names)
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.phase = ""

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Remove the bar."""
        if self.live is not None:
            algorithm.phase_listeners.remove(self)
            self.live.stop()
            self.live = None

    def on_exception(
        self, trainer: Trainer, algorithm: Algorithm, exception: BaseException
    ) -> None:
        """Remove the bar before an error is printed."""
        self.teardown(trainer, algorithm, "fit")

    # What -----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Show a phase as the current one.

        Args:
            phase: Name of the phase.
        """
        self.phase, self.phase_start = phase, time.monotonic()

    def end(self, phase: str) -> None:
        """Show no current phase.

        Args:
            phase: Name of the phase that ends.
        """
        self.phase = ""

    def render_line(self) -> Text:
        """Return the live line of the terminal."""
        line = Text(no_wrap=True, overflow="ellipsis").append_text(self.head)
        phases = [*self.seconds, *([self.phase] if self.phase not in (*self.seconds, "") else [])]
        for position, name in enumerate(phases):
            is_current, last = name == self.phase, self.seconds.get(name, 0.0)
            percent = min(99.0, 100 * (time.monotonic() - self.phase_start) / last) if last else 0.0
            passed = f" {percent:.0f} %" if is_current and last else ""
            line.append(" | " if position else "", "dim")
            line.append(name + passed, "bold" if is_current else "dim")
        return line.append(self.tail)

    def format_metrics(self, trainer: Trainer) -> list[str]:
        """Return the metrics of the last step as text, one entry each."""
        values = trainer.callback_metrics
        return [f"{n} {float(values[n]):.4g}" for n in self.metrics if n in values]

    def format_speed(self, trainer: Trainer) -> list[str]:
        """Return tokens per second and each phase's share of the time; empty without `Timing`."""
        values, total = trainer.callback_metrics, sum(self.seconds.values())
        if "tokens_per_second" not in values or not total:
            return []
        shares = [f"{name} {100 * part / total:.0f} %" for name, part in self.seconds.items()]
        return [f"{float(values['tokens_per_second']):,.0f} tokens/s", " | ".join(shares)]


def render_bar(fraction: float) -> list[tuple[str, str]]:
    """Return the filled and the empty part of a bar with their colors.

    Example:
        >>> [len(text) for text, _ in render_bar(0.25)]
        [4, 12]
    """
    full = round(fraction * BAR_WIDTH)
    return [("━" * full, "green"), ("━" * (BAR_WIDTH - full), "dim")]


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds as text, without hours if there are none.

    Example:
        >>> format_duration(3723), format_duration(61)
        ('1:02:03', '1:01')
    """
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

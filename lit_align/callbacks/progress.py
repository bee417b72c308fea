"""How a run goes: a few lines that read as well in a file as on a screen, and on it a live one."""

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
BAR_WIDTH = 16  # letters of the bar


class Progress(Callback):
    """Prints the main metrics some twenty times over a run; on a terminal, a bar below them.

    A line ends with the tokens per second and the shares of the phases that `Timing` has measured,
    and the time that is left. The bar knows the phase under way, and how much of it is over if it
    takes as long as in the iteration before. The first rank alone prints.

    Args:
        lines_per_fit: Lines per fit, about; in a run without an end, steps per line.
        metrics: Which metrics to show, where an algorithm logs them.
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
        self.head, self.tail = Text(), ""  # of the bar, around the phases
        self.phase, self.phase_start = "", 0.0  # under way, and when it began
        self.seconds: dict[str, float] = {}  # of the last iteration, by phase

    # When -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Starts the clock, and on a terminal the bar."""
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
        """Prints a line every so many batches, and at the end of an epoch."""
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
        """The bar says that training waits."""
        self.begin("validation")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Prints what the validation measured."""
        if not trainer.sanity_checking:
            values = trainer.callback_metrics
            names = [name for name in values if name.startswith("val/")]
            line = "  ".join(f"{name} {float(values[name]):.4g}" for name in names)
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.phase = ""

    def teardown(self, trainer: Trainer, algorithm: Algorithm, stage: str) -> None:
        """Takes the bar away."""
        if self.live is not None:
            algorithm.phase_listeners.remove(self)
            self.live.stop()
            self.live = None

    def on_exception(
        self, trainer: Trainer, algorithm: Algorithm, exception: BaseException
    ) -> None:
        """Takes the bar away, so that the error stands on lines of its own."""
        self.teardown(trainer, algorithm, "fit")

    # What -----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """A phase starts."""
        self.phase, self.phase_start = phase, time.monotonic()

    def end(self, phase: str) -> None:
        """It is over."""
        self.phase = ""

    def render_line(self) -> Text:
        """The line on a terminal, as it is at this moment."""
        line = Text(no_wrap=True, overflow="ellipsis").append_text(self.head)
        phases = [*self.seconds, *([self.phase] if self.phase not in (*self.seconds, "") else [])]
        for position, name in enumerate(phases):
            is_current, last = name == self.phase, self.seconds.get(name, 0.0)
            fraction = (
                min(99.0, 100 * (time.monotonic() - self.phase_start) / last) if last else 0.0
            )
            passed = f" {fraction:.0f} %" if is_current and last else ""
            line.append(" | " if position else "", "dim")
            line.append(name + passed, "bold" if is_current else "dim")
        return line.append(self.tail)

    def format_metrics(self, trainer: Trainer) -> list[str]:
        """The metrics of the last step that this algorithm logs."""
        values = trainer.callback_metrics
        return [f"{n} {float(values[n]):.4g}" for n in self.metrics if n in values]

    def format_speed(self, trainer: Trainer) -> list[str]:
        """Tokens per second, and each phase's share of the iteration; empty if nobody measured."""
        values, total = trainer.callback_metrics, sum(self.seconds.values())
        if "tokens_per_second" not in values or not total:
            return []
        shares = [f"{name} {100 * part / total:.0f} %" for name, part in self.seconds.items()]
        return [f"{float(values['tokens_per_second']):,.0f} tokens/s", " | ".join(shares)]


def render_bar(fraction: float) -> list[tuple[str, str]]:
    """A bar of which a share is full."""
    full = round(fraction * BAR_WIDTH)
    return [("━" * full, "green"), ("━" * (BAR_WIDTH - full), "dim")]


def format_duration(seconds: float) -> str:
    """1:02:03, without the hours where there are none."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

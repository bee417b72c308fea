"""Picture of a run's metrics."""

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure


class Curves(Callback):
    """Draw `curves.png` in the run folder when training ends, from the CSV logger's metrics.

    Args:
        metrics: Metrics to draw, one panel each. Metrics that were not logged are left out.
    """

    def __init__(
        self,
        metrics: tuple[str, ...] = (
            "loss",
            "val/loss",
            "val/accuracy",
            "reward",
            "val/reward",
            "kl/per_response_k1",
            "entropy",
            "completions/mean_length",
        ),
    ):
        self.metrics = metrics

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Draw the metrics of each CSV logger."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                metrics = Path(logger.log_dir) / "metrics.csv"
                if metrics.exists():  # it does not if nothing was logged
                    draw_curves(metrics, self.metrics, metrics.with_name("curves.png"))


def draw_curves(metrics: Path, names: tuple[str, ...], path: Path) -> None:
    """Draw one panel per metric with at least two values, over optimizer steps.

    Args:
        metrics: metrics.csv of a run.
        names: Metrics to draw.
        path: Picture to write. None is written if no metric has two values.
    """
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    series = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        for name in names
    }
    panels = {name: points for name, points in series.items() if len(points) > 1}
    if not panels:
        return
    columns = min(len(panels), 3)
    rows_needed = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows_needed), layout="constrained")
    grid = figure.subplots(rows_needed, columns, squeeze=False).flatten()
    for axes, (name, points) in zip(grid, panels.items(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="#2a6f97", marker="." if len(points) < 20 else "")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("optimizer steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)

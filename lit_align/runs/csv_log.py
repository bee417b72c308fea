"""CSV logger whose metrics.csv keeps its rows when a run is resumed."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_align.runs.atomic_io import atomic_file

MetricsRow = dict[str, Any]


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger with rows kept until `rewind`, not deleted at the start.

    Args:
        folder: Run folder, in which `metrics.csv` is written.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> "CSVFile":
        """The writer of the file."""
        if self._experiment is None:  # attribute of CSVLogger, checked with lightning 2.6.6
            self._experiment = CSVFile(self.log_dir)
        assert isinstance(self._experiment, CSVFile)
        return self._experiment

    @rank_zero_only
    def rewind(self, steps: int) -> None:
        """Drop the rows after the first steps of the run.

        Args:
            steps: Number of Lightning batches whose rows are kept.
        """
        self.experiment.rewind(steps)


class CSVFile(ExperimentWriter):
    """Writer of metrics.csv, which appends rows and rewrites the file for a new column.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.path = Path(self.metrics_file_path)
        self.metrics_keys = metric_names(self.read_rows())

    def _check_log_dir_exists(self) -> None:
        """Keep an existing file, which Lightning 2.6.6 would delete here."""

    def read_rows(self) -> list[MetricsRow]:
        """Return the complete rows. A killed run may have written half of its last line."""
        if not self.path.is_file():
            return []
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
        return [row for row in rows if row.get("step", "").isdigit()]

    def rewind(self, steps: int) -> None:
        """Keep only the rows of the first steps.

        Args:
            steps: Number of Lightning batches whose rows are kept.
        """
        self.save()
        self.rewrite([row for row in self.read_rows() if int(row["step"]) < steps])

    def save(self) -> None:
        """Write the rows that were logged since the last call."""
        if not self.metrics:
            return
        if set(metric_names(self.metrics)) <= set(self.metrics_keys):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        else:
            self.rewrite([*self.read_rows(), *self.metrics])
        self.metrics = []

    def rewrite(self, rows: list[MetricsRow]) -> None:
        """Replace the file atomically, or delete it if there are no rows."""
        self.metrics_keys = metric_names(rows)
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        with atomic_file(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def metric_names(rows: list[MetricsRow]) -> list[str]:
    """Return the columns of all rows in alphabetical order.

    Example:
        >>> metric_names([{"step": 0, "loss": 1.0}, {"reward": 2.0}])
        ['loss', 'reward', 'step']
    """
    return sorted({key for row in rows for key in row})

"""metrics.csv of a run, of which a resumed run keeps the rows."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

MetricsRow = dict[str, Any]


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, but for the start: rows are kept until `rewind` says from where on.

    Args:
        folder: The run's; `metrics.csv` is written into it.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> "CSVFile":
        """What writes the file."""
        if self._experiment is None:
            self._experiment = CSVFile(self.log_dir)
        assert isinstance(self._experiment, CSVFile)
        return self._experiment

    @rank_zero_only
    def rewind(self, steps: int) -> None:
        """Drops the rows of all but the first steps of the run.

        Args:
            steps: Lightning batches, whose rows stay.
        """
        self.experiment.rewind(steps)


class CSVFile(ExperimentWriter):
    """The file: appended to, and replaced as a whole where its header grows.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.path = Path(self.metrics_file_path)
        self.metrics_keys = metric_names(self.read_rows())

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file here."""

    def read_rows(self) -> list[MetricsRow]:
        """The rows that are whole: a killed run may have left half a line."""
        if not self.path.is_file():
            return []
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
        return [row for row in rows if row.get("step", "").isdigit()]

    def rewind(self, steps: int) -> None:
        """Keeps the rows of the first steps, and no others.

        Args:
            steps: Lightning batches.
        """
        self.save()
        self.rewrite([row for row in self.read_rows() if int(row["step"]) < steps])

    def save(self) -> None:
        """Puts what was logged since the last time into the file."""
        if not self.metrics:
            return
        if set(metric_names(self.metrics)) <= set(self.metrics_keys):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        else:
            self.rewrite([*self.read_rows(), *self.metrics])
        self.metrics = []

    def rewrite(self, rows: list[MetricsRow]) -> None:
        """Writes the file anew; a kill leaves the old one or the new one."""
        self.metrics_keys = metric_names(rows)
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)


def metric_names(rows: list[MetricsRow]) -> list[str]:
    """The columns, in alphabetical order."""
    return sorted({key for row in rows for key in row})

"""ResumableCSVLogger: a resumed run keeps each earlier row once."""

import csv

import pytest

from lit_align.runs.csv_log import ResumableCSVLogger


def log(folder, steps, **more) -> ResumableCSVLogger:
    logger = ResumableCSVLogger(folder)
    for step in steps:
        logger.log_metrics({"loss": step / 2, **more}, step)
    logger.save()
    return logger


def rows(folder) -> list[tuple[int, str]]:
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


def test_resumed_rows_are_appended(tmp_path):
    log(tmp_path, [0, 1, 2])
    ResumableCSVLogger(tmp_path).rewind(2)
    log(tmp_path, [2, 3])
    assert rows(tmp_path) == [(0, "0.0"), (1, "0.5"), (2, "1.0"), (3, "1.5")]


def test_rewind_to_zero_deletes_file(tmp_path):
    log(tmp_path, [0, 1, 2])
    ResumableCSVLogger(tmp_path).rewind(0)
    assert not (tmp_path / "metrics.csv").exists()


def test_new_metric_is_new_column(tmp_path):
    log(tmp_path, [0])
    log(tmp_path, [1], accuracy=0.5)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["accuracy,loss,step", ",0.0,0", "0.5,0.5,1"]


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_half_line_of_killed_run_is_dropped(tmp_path, cut):
    log(tmp_path, [0, 10, 20])  # the last line is "10.0,20"
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes().rstrip()[:-cut])
    ResumableCSVLogger(tmp_path).rewind(100)
    assert rows(tmp_path) == [(0, "0.0"), (10, "5.0")]

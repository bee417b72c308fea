"""Atomic writes: a failed write keeps the old file and removes the partial one."""

import pytest

from lit_align.runs.atomic_io import atomic_file, write_text_atomic


def write_half(path) -> None:
    with atomic_file(path) as part:
        part.write_text("half")
        raise OSError("full")


def test_failed_write_keeps_old_file(tmp_path):
    path = tmp_path / "metrics.csv"
    write_text_atomic(path, "old")
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_file_is_replaced_after_the_block(tmp_path):
    path = tmp_path / "metrics.csv"
    write_text_atomic(path, "old")
    with atomic_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]

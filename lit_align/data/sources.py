"""Where rows come from: the hub, local files, the toy grammar."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lit_align.data.toy import toy_rows
from lit_align.errors import UserError

Row = dict[str, Any]
SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"}
BLANK_LINE = r"\n[ \t]*\n\s*"


@dataclass
class Source:
    """One of the data sets that are mixed.

    Args:
        path: Hub id, local file or folder, or the word toy.
        name: Configuration of a hub data set.
        split: Split of a hub data set, a folder or the toy data.
        weight: Times that an epoch has each training row: 0.5 is a random half, 2 all rows twice.
        rename_columns: New names of columns, such as {question: prompt}; the old ones stay too.
        separator: Regular expression between two texts of a .txt file.
        column_names: Those of a .csv or .tsv file that has no line with them; makes a .txt file
            a table as well, with tabs between the columns.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    rename_columns: dict[str, str] | None = None
    separator: str = BLANK_LINE
    column_names: list[str] | None = None


def check_local_path(path: str) -> None:
    """Refuses a path that means a file or folder which is not there; a hub id is not looked up.

    Args:
        path: As of `load_rows`.
    """
    local_path = Path(path).expanduser()
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if (looks_local or local_path.suffix in SUFFIXES) and not local_path.exists():
        raise UserError(f"there is no file or folder '{path}'")


def load_rows(
    path: str,
    name: str | None = None,
    split: str = "train",
    separator: str = BLANK_LINE,
    max_rows: int | None = None,
    column_names: list[str] | None = None,
) -> list[Row]:
    """The rows of a data set, as dictionaries by column.

    Args:
        path: Hub id, local file or folder, or the word toy.
        name: Configuration of a hub data set.
        split: Split of a hub data set, a folder or the toy data.
        separator: Regular expression between two texts of a .txt file.
        max_rows: At most so many rows, the first ones.
        column_names: Column names of tables without a line of them.
    """
    check_local_path(path)
    local_path = Path(path).expanduser()
    if path == "toy":
        rows: Iterator[Row] = iter(toy_rows(split, max_rows=max_rows))
    elif local_path.is_dir():
        rows = folder_rows(local_path, split, separator, column_names)
    elif local_path.is_file():
        if split != "train":
            raise UserError(
                f"'{path}' is one file and has no split '{split}': use data.eval_path for a file, "
                "or data.eval_fraction"
            )
        rows = file_rows(local_path, separator, column_names)
    else:
        rows = hub_rows(path, name, split)
    loaded = list(islice(rows, max_rows))
    if not loaded:
        raise UserError(f"'{path}' has no rows")
    return loaded


def file_rows(path: Path, separator: str, column_names: list[str] | None) -> Iterator[Row]:
    """The rows of one local file, by its suffix."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' is none of {', '.join(sorted(SUFFIXES))}")
    if path.suffix == ".parquet":
        return parquet_rows(path)
    text = read_text(path)
    if path.suffix == ".jsonl":
        return json_lines(path, text)
    if path.suffix == ".json":
        return json_rows(path, text)
    if path.suffix in (".csv", ".tsv") or column_names is not None:
        return table_rows(path, text, column_names)
    texts = (part.strip() for part in re.split(separator, text))
    return ({"text": part} for part in texts if part)


def read_text(path: Path) -> str:
    """A file in UTF-8, or one sentence about where it is not; a table's line ends stay."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"line {line} of '{path}' is not UTF-8: {error.reason}") from None
    if path.suffix in (".csv", ".tsv"):  # a cell may hold line ends of any kind
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def table_rows(path: Path, text: str, column_names: list[str] | None) -> Iterator[Row]:
    """Columns between commas, where quotes may enclose them, or between tabs, without quotes."""
    lines = io.StringIO(text, newline="")
    if path.suffix == ".csv":
        reader = csv.DictReader(lines, column_names)
    else:
        reader = csv.DictReader(lines, column_names, delimiter="\t", quoting=csv.QUOTE_NONE)
    for row in reader:
        if None in row or None in row.values():
            names = reader.fieldnames or []
            location = f"line {reader.line_num} of '{path}'"
            raise UserError(f"{location} does not have the {len(names)} columns {', '.join(names)}")
        yield dict(row)


def json_lines(path: Path, text: str) -> Iterator[Row]:
    """One JSON object per line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield parse_json_object(path, f"line {number}", line)


def json_rows(path: Path, text: str) -> Iterator[Row]:
    """A JSON list of objects; or objects one per line, as many .json files on the hub are."""
    if not text.lstrip().startswith("["):
        yield from json_lines(path, text)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} of '{path}' is no JSON object with named columns")
        yield row


def parse_json_object(path: Path, location: str, line: str) -> Row:
    """One JSON object, or one sentence that names its place."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{location} of '{path}' is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{location} of '{path}' is no JSON object with named columns")
    return row


def folder_rows(
    path: Path, split: str, separator: str, column_names: list[str] | None
) -> Iterator[Row]:
    """All rows of the files in a folder whose names begin with the split; of all if none does.

    A folder that `datasets` saved is read as such.
    """
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return saved_rows(path, split)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    splits = re.compile(r"(train|valid|validation|val|dev|eval|test)([-_.]|$)")
    if any(splits.match(file.stem) for file in files):
        named = [file for file in files if re.match(rf"{re.escape(split)}([-_.]|$)", file.stem)]
        if not named:
            names = ", ".join(file.name for file in files)
            raise UserError(f"'{path}' has no file of the split '{split}', only {names}")
        files = named
    if not files:
        raise UserError(f"'{path}' holds no {', '.join(sorted(SUFFIXES))} file")
    return (row for file in files for row in file_rows(file, separator, column_names))


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, streamed: nothing is written to a cache."""
    from datasets import load_dataset  # seconds to import

    return iter(load_dataset("parquet", data_files=str(path), split="train", streaming=True))


def saved_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a folder written by `save_to_disk`."""
    from datasets import DatasetDict, load_from_disk  # seconds to import

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return iter(saved)
    if split not in saved:
        raise UserError(f"'{path}' has no split '{split}', only {', '.join(saved)}")
    return iter(saved[split])


def hub_rows(path: str, name: str | None, split: str) -> Iterator[Row]:
    """The rows of a hub data set; its own Python code never runs."""
    from datasets import load_dataset  # seconds to import

    try:
        return iter(load_dataset(path, name, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no rows of '{path}' (name {name}, split {split}), which is no local file either, "
            f"can be loaded from the hub: {reason}"
        ) from error

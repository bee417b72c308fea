"""Readers of rows: the hub, local files, the toy grammar."""

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

from lit_align.data.json_lines import check_json_object, json_lines
from lit_align.data.toy import toy_rows
from lit_align.errors import UserError

Row = dict[str, Any]
SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"}
BLANK_LINE = r"\n[ \t]*\n\s*"


@dataclass
class Source:
    """One data set of a mixture.

    Args:
        path: Hub id, local file or folder, or the word toy.
        name: Configuration name of a hub data set. Default: the data set's own default.
        split: Split of a hub data set, a folder or the toy data.
        weight: Number of times that an epoch contains each training row. 0.5 takes a random half
            of the rows, 2 takes each row twice.
        rename_columns: New column names, such as {question: prompt}. The old names are kept.
        separator: Regular expression between two texts of a .txt file. Default: a blank line.
        column_names: Column names of a .csv or .tsv file without a header line. With them, a .txt
            file is read as a table with tabs between the columns.

    Example:
        >>> Source("toy", weight=0.5).split
        'train'
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    rename_columns: dict[str, str] | None = None
    separator: str = BLANK_LINE
    column_names: list[str] | None = None


def check_local_path(path: str) -> None:
    """Refuse the path of a missing file or folder. Hub ids are not looked up.

    Args:
        path: Path or hub id as in `load_rows`.

    Example:
        >>> check_local_path("someone/data")
        >>> check_local_path("no/such/rows.jsonl")
        Traceback (most recent call last):
        ...
        lit_align.errors.UserError: there is no file or folder 'no/such/rows.jsonl'
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
    """Return the rows of a data set as dictionaries by column.

    Args:
        path: Hub id, local file or folder, or the word toy.
        name: Configuration name of a hub data set.
        split: Split of a hub data set, a folder or the toy data.
        separator: Regular expression between two texts of a .txt file.
        max_rows: Most rows, from the first on. Default: all.
        column_names: Column names of a table without a header line.

    Example:
        >>> rows = load_rows("toy", split="test", max_rows=2)
        >>> len(rows), sorted(rows[0])
        (2, ['chosen', 'completion', 'prompt', 'rejected'])
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
                f"'{path}' is one file and has no split '{split}'. Use --data.eval_path for "
                "another file, or --data.eval_fraction."
            )
        rows = file_rows(local_path, separator, column_names)
    else:
        rows = hub_rows(path, name, split)
    loaded = list(islice(rows, max_rows))
    if not loaded:
        raise UserError(f"'{path}' has no rows")
    return loaded


def file_rows(path: Path, separator: str, column_names: list[str] | None) -> Iterator[Row]:
    """Return the rows of one local file, read by its suffix.

    Args:
        path: File with a suffix of `SUFFIXES`.
        separator: Regular expression between two texts of a .txt file.
        column_names: Column names of a table without a header line.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' has none of the suffixes {', '.join(sorted(SUFFIXES))}")
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
    """Return the text of a UTF-8 file. Line ends become newlines, except in tables."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"line {line} of '{path}' is not UTF-8 ({error.reason})") from None
    if path.suffix in (".csv", ".tsv"):  # a cell may contain line ends of any kind
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def table_rows(path: Path, text: str, column_names: list[str] | None) -> Iterator[Row]:
    r"""Yield the rows of a table: cells between commas or quotes (.csv), or between tabs.

    Args:
        path: File of the table. Any suffix but .csv means tabs without quotes.
        text: Content of the file.
        column_names: Column names. Default: the first line.

    Example:
        >>> list(table_rows(Path("rows.csv"), 'prompt,answer\n"a, b",4\n', None))
        [{'prompt': 'a, b', 'answer': '4'}]
    """
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


def json_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the objects of a JSON list or of JSON lines.

    Many .json files on the hub are JSON lines.

    Args:
        path: File of the text, for error messages.
        text: Content of the file.

    Example:
        >>> list(json_rows(Path("rows.json"), '[{"level": 1}, {"level": 2}]'))
        [{'level': 1}, {'level': 2}]
    """
    if not text.lstrip().startswith("["):
        yield from json_lines(path, text)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from None
    for number, row in enumerate(rows):
        yield check_json_object(path, f"row {number}", row)


def folder_rows(
    path: Path, split: str, separator: str, column_names: list[str] | None
) -> Iterator[Row]:
    """Return the rows of all files of a split in a folder.

    The name of a file begins with its split. If no name begins with any split, all files are read.
    A folder that `datasets` saved is read by `datasets`.

    Args:
        path: Folder. Its subfolders are searched too.
        split: Name of the split.
        separator: Regular expression between two texts of a .txt file.
        column_names: Column names of tables without a header line.
    """
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return saved_rows(path, split)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    splits = re.compile(r"(train|valid|validation|val|dev|eval|test)([-_.]|$)")
    if any(splits.match(file.stem) for file in files):
        named = [file for file in files if re.match(rf"{re.escape(split)}([-_.]|$)", file.stem)]
        if not named:
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"'{path}' has no file of the split '{split}', found {names}. Set --data.split."
            )
        files = named
    if not files:
        raise UserError(f"'{path}' has no file with a suffix {', '.join(sorted(SUFFIXES))}")
    return (row for file in files for row in file_rows(file, separator, column_names))


def parquet_rows(path: Path) -> Iterator[Row]:
    """Return the rows of a parquet file. They are streamed: nothing is written to a cache."""
    from datasets import load_dataset  # here, because its import takes seconds

    return iter(load_dataset("parquet", data_files=str(path), split="train", streaming=True))


def saved_rows(path: Path, split: str) -> Iterator[Row]:
    """Return the rows of a folder written by `save_to_disk` of `datasets`."""
    from datasets import DatasetDict, load_from_disk  # here, because its import takes seconds

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return iter(saved)
    if split not in saved:
        raise UserError(
            f"'{path}' has no split '{split}', found {', '.join(saved)}. Set --data.split."
        )
    return iter(saved[split])


def hub_rows(path: str, name: str | None, split: str) -> Iterator[Row]:
    """Return the rows of a hub data set. Python code of the data set never runs."""
    from datasets import load_dataset  # here, because its import takes seconds

    try:
        return iter(load_dataset(path, name, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"'{path}' (name {name}, split {split}) is not a local file and cannot be loaded from "
            f"the hub: {reason}"
        ) from error

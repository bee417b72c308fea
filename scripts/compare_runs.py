"""Compare the metrics of two folders of runs. A refactor must keep every number.

    python scripts/compare_runs.py BEFORE AFTER

Each `metrics.csv` below BEFORE is compared with the file of the same relative path below AFTER.
Columns of BEFORE are first renamed by `lit_align.renamed.LOG_KEYS`. Then all cells must be equal as
text, to the last digit. Columns that measure time or memory are ignored. The exit status is 1 if
anything differs or if nothing was compared.
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from lit_align.renamed import LOG_KEYS

IGNORED = ("time/*", "tokens_per_second", "memory/*")  # a rerun changes them


class Table(NamedTuple):
    """The compared part of a metrics.csv.

    Args:
        columns: Names of the columns.
        rows: Cells of each row by column name, as text.
    """

    columns: set[str]
    rows: list[dict[str, str]]


def new_name(column: str, log_keys: Mapping[str, str | None]) -> str | None:
    """Return the current name of a logged metric, or None if it is no longer logged.

    Args:
        column: Name in BEFORE. A metric of the validation has the prefix val/.
        log_keys: Renamed metrics: old name to new name, or to None.
    """
    if column in log_keys:
        return log_keys[column]
    prefix, name = ("val/", column[4:]) if column.startswith("val/") else ("", column)
    new = log_keys.get(name, name)
    return None if new is None else prefix + new


def read_table(path: Path, log_keys: Mapping[str, str | None]) -> Table:
    """Read a metrics.csv, rename its columns, and leave out time and memory.

    Args:
        path: The file.
        log_keys: Renamed metrics; empty for a file that has the current names.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file, restval="")
        fields, rows = reader.fieldnames or (), list(reader)
    names: dict[str, str] = {}  # new name: name in the file
    for column in fields:
        name = new_name(column, log_keys)
        if name in names:
            raise ValueError(f"{path}: {column} and {names[name]} would both become {name}.")
        if name is not None and not any(fnmatch(name, pattern) for pattern in IGNORED):
            names[name] = column
    return Table(set(names), [{new: row[old] for new, old in names.items()} for row in rows])


def find_differences(before: Table, after: Table) -> list[str]:
    """Return one sentence per kind of difference, none if the tables are equal."""
    found = []
    columns = sorted(before.columns & after.columns)
    for number, (old, new) in enumerate(zip(before.rows, after.rows, strict=False), start=1):
        column = next((name for name in columns if old[name] != new[name]), None)
        if column is not None:
            found.append(f"{column} in row {number} was {old[column]!r}, is {new[column]!r}")
            break
    for word, names in (
        ("missing", before.columns - after.columns),
        ("extra", after.columns - before.columns),
    ):
        if names:
            found.append(f"{word} columns: {', '.join(sorted(names))}")
    if len(before.rows) != len(after.rows):
        found.append(f"number of rows was {len(before.rows)}, is {len(after.rows)}")
    if not found and not (columns and before.rows):
        found.append("no cell to compare")
    return found


def find_runs(folder: Path) -> dict[str, Path]:
    """Return the metrics.csv of each run below a folder, by the run's relative path."""
    files = sorted(folder.rglob("metrics.csv"))
    return {file.parent.relative_to(folder).as_posix(): file for file in files}


def compare_folders(before: Path, after: Path, log_keys: Mapping[str, str | None]) -> int:
    """Print one line per run and a summary. Return the exit status.

    Args:
        before: Folder of runs with the old names.
        after: Folder of runs with the current names.
        log_keys: Renamed metrics.
    """
    old, new = find_runs(before), find_runs(after)
    num_different = 0
    for run in sorted(old.keys() | new.keys()):
        if run not in new or run not in old:
            differences = [f"missing in {after if run not in new else before}"]
        else:
            table = read_table(old[run], log_keys)
            differences = find_differences(table, read_table(new[run], {}))
        size = f" ({len(table.rows)} rows, {len(table.columns)} columns)" if not differences else ""
        print(f"{run}: {'; '.join(differences) or 'equal'}{size}")
        num_different += bool(differences)
    num_compared = len(old.keys() & new.keys())
    print(f"{num_compared} runs compared, {num_different} runs differ or are missing")
    return int(num_different > 0 or num_compared == 0)


def main(argv: list[str] | None = None) -> int:
    """Compare the two folders of the command line. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", type=Path, help="Folder of runs with the old code.")
    parser.add_argument("after", type=Path, help="Folder of runs with the new code.")
    given = parser.parse_args(argv)
    return compare_folders(given.before, given.after, LOG_KEYS)


if __name__ == "__main__":
    sys.exit(main())

"""Choose the completions of a report: worst and best rewards, and repeated prompts."""

import json
import math
from collections.abc import Iterator
from itertools import zip_longest

from lit_align.runs.run_folder import ResponseRow, RunFolder, conversation_text, read_responses

MAX_ROLLOUTS = 8  # rollouts per run, the first and the last among them
NUM_ROWS = 20  # rows of each kind and rollout: worst, best, evenly spaced
MAX_CHARACTERS = 3000  # of a text


class SampledResponses:
    """Completions of all runs within a limit of bytes. Each prompt is stored once.

    Args:
        num_bytes: Most bytes of all texts and numbers as JSON.
        num_runs: Number of runs, which get equal parts.
    """

    def __init__(self, num_bytes: int, num_runs: int):
        self.max_bytes = num_bytes // num_runs
        self.prompts: dict[str, int] = {}
        self.rows: list[ResponseRow] = []
        self.notes: list[str] = []

    def add(self, run: RunFolder, index: int) -> None:
        """Add the completions of a run that fit, in turn from each of its tables.

        Args:
            run: Run folder.
            index: Index of the run in the report.
        """
        tables = {
            f"rollout {n}": read_responses(run.rollouts[n]) for n in evenly_spaced([*run.rollouts])
        }
        for n in evenly_spaced([*run.held_out]):
            when = f"held out, rollout {n}" if n else "held out, before training"
            tables[when] = read_responses(run.held_out[n])
        if run.predictions:
            tables["predictions"] = read_responses(run.predictions)
        num_tables: dict[str, int] = {}
        for rows in tables.values():
            for prompt in {conversation_text(row.get("prompt")) for row in rows}:
                num_tables[prompt] = num_tables.get(prompt, 0) + 1
        ranked = [
            [(order, label, row) for row in pick_rows(rows, num_tables)]
            for order, (label, rows) in enumerate(tables.items())
        ]
        bytes_left = self.max_bytes
        # Take one row of each table in turn, so the byte limit shortens all tables equally.
        for order, label, row in interleave(ranked):
            entry = page_entry(row, index, order, label)
            prompt = truncate_middle(conversation_text(row.get("prompt")))
            prompt_size = 0 if prompt in self.prompts else json_size(prompt)
            if json_size(entry) + prompt_size <= bytes_left:
                bytes_left -= json_size(entry) + prompt_size
                entry["p"] = self.prompts.setdefault(prompt, len(self.prompts))
                self.rows.append(entry)
        total, number = sum(map(len, tables.values())), sum(row["r"] == index for row in self.rows)
        if tables:
            self.notes.append(f"{run.path.name}: {number:,} of {total:,} responses are shown.")


def interleave(
    tables: list[list[tuple[int, str, ResponseRow]]],
) -> Iterator[tuple[int, str, ResponseRow]]:
    """Yield the first row of each table, then the second of each, and so on.

    Args:
        tables: Ranked rows of each table, with the table's order and label.
    """
    for rows in zip_longest(*tables):
        yield from (row for row in rows if row is not None)


def evenly_spaced(values: list[int], max_count: int = MAX_ROLLOUTS) -> list[int]:
    """Return at most `max_count` values at equal distances, the first and the last among them.

    Example:
        >>> evenly_spaced([0, 1, 2, 3, 4, 5, 6, 7, 8], max_count=3)
        [0, 4, 8]
    """
    if len(values) <= max_count:
        return values
    return [values[round(i * (len(values) - 1) / (max_count - 1))] for i in range(max_count)]


def pick_rows(rows: list[ResponseRow], num_tables: dict[str, int]) -> list[ResponseRow]:
    """Return worst and best rows in turn, rows of repeated prompts, and some of the others.

    Args:
        rows: Rows of one table.
        num_tables: Number of tables that contain a prompt, by prompt.
    """
    order = sorted(range(len(rows)), key=lambda row: row_score(rows[row]))
    ends = [
        row for pair in zip(order[:NUM_ROWS], order[::-1][:NUM_ROWS], strict=True) for row in pair
    ]
    repeated = [
        row
        for row in range(len(rows))
        if num_tables[conversation_text(rows[row].get("prompt"))] > 1
    ]
    kept = dict.fromkeys(
        [*ends, *repeated[: 2 * NUM_ROWS], *evenly_spaced([*range(len(rows))], NUM_ROWS)]
    )
    return [rows[row] for row in kept]


def row_score(row: ResponseRow) -> float:
    """Return the score of a response, 0 if it has none or if it is not finite."""
    found = finite_or_none(row.get("score"))
    return 0.0 if found is None else found


def finite_or_none(value: object) -> float | None:
    """Return a finite number with four digits, and None for anything else.

    Example:
        >>> finite_or_none(1.23456), finite_or_none("text")
        (1.235, None)
    """
    try:
        rounded = float(f"{value:.4g}") if isinstance(value, int | float) else math.nan
    except OverflowError:  # an int that is too large for a float
        return None
    return rounded if math.isfinite(rounded) else None


def page_entry(row: ResponseRow, index: int, order: int, label: str) -> ResponseRow:
    """Return a row with the keys that `report.js` reads.

    Args:
        row: Row of a table.
        index: Index of the run.
        order: Position of the table among the run's tables.
        label: Name of the table on the page.
    """
    entry: ResponseRow = {
        "r": index,
        "o": order,
        "t": label,
        "c": truncate_middle(conversation_text(row.get("completion"))),
    }
    for short, name in (("s", "score"), ("n", "length"), ("k", "kl")):
        found = finite_or_none(row.get(name))
        if found is not None:
            entry[short] = found
    marks = [name for name in ("truncated", "greedy", "stored") if row.get(name)]
    return {**entry, "m": marks}


def truncate_middle(text: str) -> str:
    """Replace the middle of a text longer than 3,000 characters by a note."""
    half = MAX_CHARACTERS // 2
    num_omitted = len(text) - MAX_CHARACTERS
    if num_omitted <= 0:
        return text
    return f"{text[:half]}\n[... {num_omitted:,} characters left out ...]\n{text[-half:]}"


def json_size(value: object) -> int:
    """Return the bytes of a value in the page.

    Example:
        >>> json_size("é")  # two quotes and a letter of two bytes
        4
    """
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

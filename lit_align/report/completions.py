"""Which of a run's completions a report shows: the worst, the best, and those that repeat."""

import json
import math
from collections.abc import Iterator
from itertools import zip_longest

from lit_align.runs.run_folder import Row, RunFolder, answers, conversation_text

NUM_FILES = 8  # rollouts per run, the first and the last among them
NUM_ROWS = 20  # rows of each kind and rollout: worst, best, spread over all
LONGEST = 3000  # characters of a text


class Kept:
    """Completions of all runs within a budget, prompts once each.

    Args:
        num_bytes: Of all texts and figures as JSON.
        num_runs: Among which they are divided.
    """

    def __init__(self, num_bytes: int, num_runs: int):
        self.share = num_bytes // num_runs
        self.prompts: dict[str, int] = {}
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(self, run: RunFolder, place: int) -> None:
        """Takes what fits of a run, from all kept rollouts alike.

        Args:
            run: Its folder.
            place: Its number in the report.
        """
        tables = {f"rollout {n}": answers(run.rollouts[n]) for n in spread([*run.rollouts])}
        for n in spread([*run.held_out]):
            when = f"held out, rollout {n}" if n else "held out, before training"
            tables[when] = answers(run.held_out[n])
        if run.predictions:
            tables["predictions"] = answers(run.predictions)
        known: dict[str, int] = {}
        for rows in tables.values():
            for prompt in {conversation_text(row.get("prompt")) for row in rows}:
                known[prompt] = known.get(prompt, 0) + 1
        ranked = [
            [(order, label, row) for row in picked(rows, known)]
            for order, (label, rows) in enumerate(tables.items())
        ]
        left = self.share
        for order, label, row in alternating(ranked):
            entry = shown(row, place, order, label)
            prompt = shortened(conversation_text(row.get("prompt")))
            new = 0 if prompt in self.prompts else size(prompt)
            if size(entry) + new <= left:
                left -= size(entry) + new
                entry["p"] = self.prompts.setdefault(prompt, len(self.prompts))
                self.rows.append(entry)
        total, number = sum(map(len, tables.values())), sum(row["r"] == place for row in self.rows)
        if tables:
            self.notes.append(f"{run.path.name}: {number:,} of {total:,} answers are shown.")


def alternating(tables: list[list[tuple[int, str, Row]]]) -> Iterator[tuple[int, str, Row]]:
    """The first row of each table, then the second of each."""
    for rows in zip_longest(*tables):
        yield from (row for row in rows if row is not None)


def spread(places: list[int], most: int = NUM_FILES) -> list[int]:
    """At most so many places at equal distances, the first and the last among them."""
    if len(places) <= most:
        return places
    return [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]


def picked(rows: list[Row], known: dict[str, int]) -> list[Row]:
    """Worst and best in turn, rows whose prompt has several tables, and some of the others.

    Args:
        rows: Of one rollout.
        known: In how many tables a prompt is.
    """
    order = sorted(range(len(rows)), key=lambda row: score(rows[row]))
    ends = [
        row for pair in zip(order[:NUM_ROWS], order[::-1][:NUM_ROWS], strict=True) for row in pair
    ]
    again = [
        row for row in range(len(rows)) if known[conversation_text(rows[row].get("prompt"))] > 1
    ]
    kept = dict.fromkeys([*ends, *again[: 2 * NUM_ROWS], *spread([*range(len(rows))], NUM_ROWS)])
    return [rows[row] for row in kept]


def score(row: Row) -> float:
    """The reward of an answer, 0 where there was none."""
    found = figure(row.get("score"))
    return 0.0 if found is None else found


def figure(value: object) -> float | None:
    """Four digits of a finite number; None for anything else."""
    try:
        rounded = float(f"{value:.4g}") if isinstance(value, int | float) else math.nan
    except OverflowError:  # of an int
        return None
    return rounded if math.isfinite(rounded) else None


def shown(row: Row, place: int, order: int, label: str) -> Row:
    """What the page needs of a row."""
    entry: Row = {
        "r": place,
        "o": order,
        "t": label,
        "c": shortened(conversation_text(row.get("completion"))),
    }
    for short, name in (("s", "score"), ("n", "length"), ("k", "kl")):
        found = figure(row.get(name))
        if found is not None:
            entry[short] = found
    marks = [name for name in ("truncated", "greedy", "stored") if row.get(name)]
    return {**entry, "m": marks}


def shortened(whole: str) -> str:
    """A long text without its middle."""
    half = LONGEST // 2
    left_out = len(whole) - LONGEST
    if left_out <= 0:
        return whole
    return f"{whole[:half]}\n[... {left_out:,} characters left out ...]\n{whole[-half:]}"


def size(value: object) -> int:
    """Bytes in the page."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

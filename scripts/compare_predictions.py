"""Completions of two models for the same prompts, and what their difference amounts to.

    python scripts/compare_predictions.py BEFORE.jsonl AFTER.jsonl

Both files were written by `lit-align predict` (predictions.jsonl in the run folder).
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

Answers = list[dict[str, object]]


def read(file: Path) -> Answers:
    """The answers that a `predict` wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def mean(values: list[float]) -> float:
    """Their arithmetic mean."""
    return sum(values) / len(values)


def distinct_2(answers: Answers) -> float:
    """Share of different ones among all pairs of neighbouring words (arXiv:1510.03055)."""
    words = [str(row["completion"]).split() for row in answers]
    pairs = [pair for text in words for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs)


def bootstrap(gains: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(gains, k=len(gains))) for _ in range(rounds))
    return means[rounds // 40], means[-rounds // 40]


def summarise(before: Answers, after: Answers) -> dict[str, float]:
    """The figures by which an alignment is judged; both lists answer the same prompts."""
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        raise ValueError("the two files answer different prompts, or in another order")
    old, new = [float(r["score"]) for r in before], [float(r["score"]) for r in after]
    low, high = bootstrap([b - a for a, b in zip(old, new, strict=True)])
    spread = (sum((score - mean(old)) ** 2 for score in old) / (len(old) - 1)) ** 0.5
    return {
        "prompts": len(before),
        "reward before": mean(old),
        "reward after": mean(new),
        "gain in standard deviations": (mean(new) - mean(old)) / spread,
        "gain, 95 % low": low,
        "gain, 95 % high": high,
        "KL after, nats per response": mean([float(row["kl"]) for row in after]),
        "distinct-2 before": distinct_2(before),
        "distinct-2 after": distinct_2(after),
    }


def completions_table(before: Answers, after: Answers, rows: int = 6) -> Table:
    """The first answers of both, side by side."""
    table = Table(title="Held-out prompts, before and after", show_lines=True)
    for name in ("prompt", "before", "reward", "after", "reward", "KL"):
        table.add_column(name, justify="right" if name in ("reward", "KL") else "left")
    for old, new in list(zip(before, after, strict=True))[:rows]:
        table.add_row(old["prompt"], old["completion"], f"{old['score']:.2f}",
                      new["completion"], f"{new['score']:.2f}", f"{new['kl']:.1f}")  # fmt: skip
    return table


def figures_table(figures: dict[str, float], title: str) -> Table:
    """One figure a line."""
    table = Table(title=title)
    for name in ("figure", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    return table


def main(files: list[str]) -> int:
    """Prints both tables."""
    if len(files) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    before, after = (read(Path(file)) for file in files)
    figures = figures_table(summarise(before, after), title="After against before")
    Console(width=120).print(completions_table(before, after), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

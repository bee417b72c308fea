"""Compare the completions of two models for the same prompts.

    python scripts/compare_predictions.py BEFORE.jsonl AFTER.jsonl

Both files were written by `lit-align predict` (predictions.jsonl in the run folder).
"""

import sys
from pathlib import Path

from rich.console import Console

from lit_align.evaluation.statistics import (
    ResponseRows,
    bootstrap_interval,
    distinct_2,
    mean,
    read_predictions,
)
from lit_align.evaluation.tables import completions_table, statistics_table


def summarize(before: ResponseRows, after: ResponseRows) -> dict[str, float]:
    """Return the statistics of an alignment. Both lists have the same prompts in the same order."""
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        raise ValueError(
            "The two files have different prompts, or in another order. Use two runs of one config."
        )
    old, new = [float(r["score"]) for r in before], [float(r["score"]) for r in after]
    low, high = bootstrap_interval([b - a for a, b in zip(old, new, strict=True)])
    std = (sum((score - mean(old)) ** 2 for score in old) / (len(old) - 1)) ** 0.5
    return {
        "prompts": len(before),
        "reward before": mean(old),
        "reward after": mean(new),
        "gain in standard deviations": (mean(new) - mean(old)) / std,
        "gain, 95 % low": low,
        "gain, 95 % high": high,
        "KL after, nats per response": mean([float(row["kl"]) for row in after]),
        "distinct-2 before": distinct_2(before),
        "distinct-2 after": distinct_2(after),
    }


def main(files: list[str]) -> int:
    """Print both tables and return the exit status."""
    if len(files) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    before, after = (read_predictions(Path(file)) for file in files)
    statistics = statistics_table(summarize(before, after), title="After against before")
    Console(width=120).print(completions_table(before, after), statistics)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

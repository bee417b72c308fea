"""The table and the picture of a sweep, beside the papers' own figures.

    lit-align plan --sweep 7b --json > sweep.jsonl
    python scripts/plan_sweep.py sweep.jsonl docs/pictures/plan_7b --papers --title "Llama 2 7B"

Writes a CSV and a PNG, and prints the CSV as a table of Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PHASES = ("load", "rollout", "score", "prepare", "update")
COLORS = ("#bbbbbb", "#4477aa", "#66ccee", "#ccbb44", "#ee6677")
GIB = 2**30  # bytes
# Of one device at 7B, in GB; what they count is in docs/memory.md.
PAPER_FIGURES = {
    ("ppo", "AdamW"): "319 (ReMax), 220 (Hydra)",
    ("remax", "AdamW"): "172 (ReMax)",
    ("lora_ppo", "AdamW"): "68.0 (Hydra)",
    ("joint_hydra_ppo", "AdamW"): "67.9 (Hydra)",
    ("hydra_ppo", "AdamW"): "71.1 (Hydra)",
    ("sft", "AdamW"): "67.4 (SLTrain, bf16)",
    ("sft", "GaLore"): "22 (SLTrain, 8 bits)",
    ("sft", "SLTrain"): "18.3 (SLTrain, 8 bits)",
}
Row = dict[str, Any]


def table_rows(file: Path, has_papers: bool) -> list[Row]:
    """GiB by phase of each method, and what papers say.

    Args:
        file: Lines of JSON.
        has_papers: Whether their figures are of this size.
    """
    rows = []
    for line in map(json.loads, file.read_text().splitlines()):
        sizes = {phase: f"{line[phase] / GIB:.1f}" if line[phase] else "-" for phase in PHASES}
        paper = PAPER_FIGURES.get((line["method"], line["by"]), "-") if has_papers else "-"
        row = {"method": line["method"], "by": line["by"], **sizes}
        rows.append({**row, "paper, GB": paper} if has_papers else row)
    return rows


def draw_bars(rows: list[Row], title: str, file: Path) -> None:
    """A bar per method and phase.

    Args:
        rows: Of the table.
        title: Above.
        file: A PNG.
    """
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (phase, color) in enumerate(zip(PHASES, COLORS, strict=True)):
        places = [row + 0.16 * (number - 2) for row in range(len(rows))]
        sizes = [0.0 if row[phase] == "-" else float(row[phase]) for row in rows]
        axes.barh(places, sizes, 0.16, color=color, label=phase)
    axes.set_yticks(range(len(rows)), [f"{row['method']}, {row['by']}" for row in rows])
    axes.axvline(80e9 / GIB, color="black", linewidth=0.8, linestyle=":", label="80 GB")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a GPU at the height of the phase, planned")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lines", type=Path, help="what --sweep --json has printed")
    parser.add_argument("out", type=Path, help="of CSV and PNG, without an ending")
    parser.add_argument("--title", default="")
    parser.add_argument("--papers", action="store_true", help="these are of 7B")
    args = parser.parse_args()
    rows = table_rows(args.lines, args.papers)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_bars(rows, args.title, args.out.with_suffix(".png"))
    print("| " + " | ".join(rows[0]) + " |\n|" + "-|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()

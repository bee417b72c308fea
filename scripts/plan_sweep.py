"""Compare the memory of all methods at one model, length and machine, as in docs/memory.md.

    python scripts/plan_sweep.py --sizes 7b 70b --plot docs/pictures/plan
    python scripts/plan_sweep.py --path shape:llama-3-8b --max_new_tokens 1024 --devices 4

Each line is printed as soon as it is known, in GiB of one GPU. No GPU, weights or data are needed.
Every method is simulated with 3, 4 and 5 blocks and extrapolated to all blocks. `--plot` writes a
CSV and a PNG per size, and prints the CSV as a Markdown table. Exit status 1 means that a method
does not fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from plan_methods import SWEEP_SIZES, SweepRow, SweepSize, sweep_methods

from lit_align.cli.discovery import import_all
from lit_align.cli.errors import silence_known_warnings
from lit_align.cli.plan import parse_size
from lit_align.cli.plan_run import disable_logging
from lit_align.errors import UserError
from lit_align.models.weights.loading import silence_transformers
from lit_align.plan.architectures import BUILTIN_PREFIX, architecture_config
from lit_align.plan.table import GIB, PHASE_ORDER

MAX_DEVIATION = 0.01  # fraction of the peak by which a trace may be off the line
COLORS = ("#bbbbbb", "#4477aa", "#66ccee", "#ccbb44", "#ee6677")  # of PHASE_ORDER
# Figures of the papers for one device at 7B, in GB. docs/memory.md explains what they count.
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
TableRow = dict[str, str]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--sizes", nargs="+", choices=sorted(SWEEP_SIZES), default=["7b"],
                       help="Llama 2 7B on 8 GPUs, or 70B on 64. Default: 7b.")  # fmt: skip
    model.add_argument("--path", help="Another model: shape:NAME, a config.json, or a hub id.")
    add("--prompt_tokens", type=int, help="Tokens of a prompt. Default: 512.")
    add("--max_new_tokens", type=int, help="Tokens of a response. Default: 512.")
    add("--devices", type=int, help="GPUs per node. Default: 8.")
    add("--num_nodes", type=int, help="Number of nodes. Default: 1, or 8 for 70b.")
    add("--gpu_memory", type=parse_size, default="80GB", metavar="80GB",
        help="Memory of a GPU: a number and GB (10^9 bytes) or GiB (2^30 bytes).")  # fmt: skip
    add("--json", action="store_true", help="Print all bytes as JSON, one line per method.")
    add("--plot", type=Path, metavar="PREFIX",
        help="Write PREFIX_SIZE.csv and PREFIX_SIZE.png.")  # fmt: skip
    return parser


def sweep_sizes(options: argparse.Namespace) -> dict[str, SweepSize]:
    """Return the sizes to compare the methods at, by name.

    Args:
        options: Options of the command line.
    """
    if options.path:
        architecture_config(options.path)  # refuses an unknown model before the first trace
        name = Path(options.path.removeprefix(BUILTIN_PREFIX)).stem
        sizes = {name: SweepSize(options.path)}
    else:
        sizes = {name: SWEEP_SIZES[name] for name in options.sizes}
    given = {
        "prompt": options.prompt_tokens,
        "response": options.max_new_tokens,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return {name: size._replace(**changes) for name, size in sizes.items()}


def print_row(row: SweepRow, size_name: str, as_json: bool) -> None:
    """Print the peaks of a method.

    Args:
        row: Memory of the method.
        size_name: Name of the size.
        as_json: Print bytes as JSON instead of GiB.
    """
    peaks = {phase: row.peak(phase) for phase in PHASE_ORDER}
    deviation = row.extrapolation.deviation
    if as_json:
        found: dict[str, Any] = {"size": size_name, "method": row.method, "by": row.by, **peaks}
        print(json.dumps({**found, "deviation": deviation}), flush=True)
        return
    line = "  ".join(f"{phase} {peak / GIB:6.2f}" for phase, peak in peaks.items())
    if deviation > MAX_DEVIATION:
        line += f"  inexact: blocks do not grow linearly, by {deviation:.1%}"
    print(f"{row.method:<17}{row.by:<8} {line}", flush=True)


def table_rows(rows: list[SweepRow], has_papers: bool) -> list[TableRow]:
    """Return the rows of the table: GiB by phase of each method, and the papers' figures.

    Args:
        rows: Memory of each method.
        has_papers: Add a column with the papers' figures, which are of 7B.
    """
    table = []
    for row in rows:
        peaks = {phase: row.peak(phase) for phase in PHASE_ORDER}
        sizes = {phase: f"{peak / GIB:.1f}" if peak else "-" for phase, peak in peaks.items()}
        paper = {"paper, GB": PAPER_FIGURES.get((row.method, row.by), "-")} if has_papers else {}
        table.append({"method": row.method, "by": row.by, **sizes, **paper})
    return table


def write_table(table: list[TableRow], file: Path) -> None:
    """Write the table as CSV and print it as Markdown.

    Args:
        table: Rows of the table.
        file: Path of the CSV.
    """
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print("| " + " | ".join(table[0]) + " |\n|" + "-|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(row.values()) + " |")


def draw_bars(table: list[TableRow], title: str, memory: int, file: Path) -> None:
    """Draw a bar per method and phase, and a line at the memory of a GPU.

    Args:
        table: Rows of the table.
        title: Title of the picture.
        memory: Memory of a GPU in bytes.
        file: Path of the PNG.
    """
    from matplotlib.figure import Figure  # only needed here

    figure = Figure(figsize=(9, 0.42 * len(table) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (phase, color) in enumerate(zip(PHASE_ORDER, COLORS, strict=True)):
        places = [row + 0.16 * (number - 2) for row in range(len(table))]
        sizes = [0.0 if row[phase] == "-" else float(row[phase]) for row in table]
        axes.barh(places, sizes, 0.16, color=color, label=phase)
    axes.set_yticks(range(len(table)), [f"{row['method']}, {row['by']}" for row in table])
    label = f"{memory / 10**9:g} GB"
    axes.axvline(memory / GIB, color="black", linewidth=0.8, linestyle=":", label=label)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a GPU at the peak of the phase, estimated")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(file, dpi=110)


def main(argv: list[str]) -> int:
    """Plan all methods at each size, print them, and draw them with `--plot`.

    Args:
        argv: Arguments of the command line.

    Returns:
        Exit status: 0 if all methods fit, 1 if one does not, 2 for an unknown model.
    """
    options = build_parser().parse_args(argv)
    silence_known_warnings()
    import_all()
    try:
        sizes = sweep_sizes(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    largest = 0
    for name, size in sizes.items():
        rows = []
        with disable_logging(), silence_transformers():
            for row in sweep_methods(size, options.gpu_memory):
                print_row(row, name, options.json)
                rows.append(row)
        largest = max([largest, *(row.peak(phase) for row in rows for phase in PHASE_ORDER)])
        if options.plot:
            table = table_rows(rows, has_papers=size == SWEEP_SIZES["7b"])
            prefix = f"{options.plot}_{name}"
            title = f"{Path(size.path.removeprefix(BUILTIN_PREFIX)).stem}, "
            title += f"{size.devices * size.num_nodes} GPUs"
            write_table(table, Path(f"{prefix}.csv"))
            draw_bars(table, title, options.gpu_memory, Path(f"{prefix}.png"))
    return int(largest > options.gpu_memory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

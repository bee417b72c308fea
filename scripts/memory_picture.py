"""Draw the memory picture of the README: the peak memory of one 7B model under five methods.

    python scripts/memory_picture.py                  # writes docs/pictures/memory_7b.png and .csv

Each bar is one run of `lit-align plan`, which needs no GPU, no weights and no data. All five plans
take about three minutes on one CPU core. `--csv` draws again from the table of an earlier run.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from matplotlib.figure import Figure

GB = 10**9  # bytes, as GPUs are sold
GPU_MEMORY = 80  # GB
# Kinds of memory as `lit-align plan --json` names them: the name in the legend, and a color.
# The palette is Paul Tol's "bright", which color-blind readers can tell apart.
KINDS = {
    "parameters": ("weights", "#4477aa"),
    "gradients": ("gradients", "#ee6677"),
    "optimizer state": ("optimizer states", "#ccbb44"),
    "gathered": ("gathered weights", "#66ccee"),
    "KV cache": ("KV cache", "#228833"),
    "activations": ("activations", "#aa3377"),
    "logits, temporaries": ("logits, temporaries", "#bbbbbb"),
}
MODEL = "shape:llama-2-7b"
FROM_SCRATCH = """\
# Overlay: random weights of the same shape, for SLTrain
model:
  init_args:
    policy:
      init_args:
        path: null
        config:
          model_type: llama
          vocab_size: 32000
          hidden_size: 4096
          intermediate_size: 11008
          num_hidden_layers: 32
          num_attention_heads: 32
          num_key_value_heads: 32
          max_position_embeddings: 4096
          tie_word_embeddings: false
"""
# FSDP2 over 8 GPUs; on each 8 rows of 512 + 512 tokens, two rows in a micro-batch.
MACHINE = (
    "--config fsdp --trainer.devices 8 --trainer.strategy.activation_checkpointing true "
    "--data.batch_size 8 --model.microbatch_tokens 2048"
)
ROLLOUT = "--data.max_prompt_tokens 512 --rollout.max_new_tokens 512"
POLICY = f"--model.policy.path {MODEL}"
REWARD = f"--reward.functions.path {MODEL}"
CRITIC = f"--model.critic.path {MODEL} --model.minibatch_size null"
RANK = "--model.optimizer.rank 1024"
SLTRAIN = (
    "--model.policy.sltrain.rank 1024 --model.policy.sltrain.alpha 8 "
    "--model.policy.sltrain.density 0.05"
)


class Method(NamedTuple):
    """One bar of the picture.

    Args:
        name: Name on the axis.
        note: Second line on the axis: the networks of the method.
        options: Options of `lit-align plan`.
    """

    name: str
    note: str
    options: str


METHODS = [
    Method(
        "PPO",
        "policy and critic train; reference, reward model",
        f"--config ppo {MACHINE} {ROLLOUT} {POLICY} {REWARD} {CRITIC}",
    ),
    Method(
        "ReMax",
        "policy trains; reference, reward model",
        f"--config remax {MACHINE} {ROLLOUT} {POLICY} {REWARD}",
    ),
    Method(
        "Hydra-PPO",
        "two adapters train; one model serves four roles",
        f"--config hydra_ppo {MACHINE} {ROLLOUT} {POLICY}",
    ),
    Method(
        "ReMax + GaLore",
        "as ReMax, with optimizer states of rank 1024",
        f"--config remax --config galore {MACHINE} {ROLLOUT} {POLICY} {REWARD} {RANK}",
    ),
    Method(
        "SLTrain from scratch",
        "supervised; low-rank + sparse weights of rank 1024",
        "--config sft --config sltrain --config from_scratch.yaml "
        f"{MACHINE} --data.max_tokens 1024 {SLTRAIN}",
    ),
]
Row = dict[str, Any]


def plan(method: Method, folder: Path) -> Row:
    """Plan one method and return the phase with the highest peak, in GB by kind of memory.

    Args:
        method: The method.
        folder: Folder with the overlay `from_scratch.yaml`, in which the command runs.
    """
    # With a memory that fits all, `plan` does not look for changes that would make a run fit.
    command = ["plan", "--json", "--gpu_memory", "1000GB", *method.options.split()]
    print(f"$ lit-align {' '.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "lit_align.cli.main", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=folder,
    )
    found = json.loads(done.stdout)
    by_kind = found["phases"][found["phase"]]["device"]["by"]
    sizes = {kind: round(by_kind.get(kind, 0) / GB, 2) for kind in KINDS}
    return {"method": method.name, "phase": found["phase"], **sizes, "peak": found["peak"] / GB}


def read(file: Path) -> list[Row]:
    """Read the rows that an earlier run wrote."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    texts = ("method", "phase")
    return [{k: v if k in texts else float(v) for k, v in row.items()} for row in rows]


def write(rows: list[Row], file: Path) -> None:
    """Write the rows as CSV, in GB."""
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "peak": f"{row['peak']:.2f}"} for row in rows)


def draw(rows: list[Row], file: Path) -> None:
    """Draw one stacked bar per method, and a line at the memory of a GPU."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    starts = [0.0] * len(rows)
    for kind, (name, color) in KINDS.items():
        sizes = [row[kind] for row in rows]
        axes.barh(range(len(rows)), sizes, 0.6, starts, color=color, label=name)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for index, row in enumerate(rows):
        size = axes.text(row["peak"] + 1, index, f"{row['peak']:.0f} GB", fontweight="bold")
        size.set(va="center", fontsize=12)
        axes.annotate(f" in {row['phase']}", (1, 0.5), xycoords=size, va="center", color="#666666")
    style_axes(axes, rows)
    figure.suptitle("Peak memory per GPU: a 7B model on 8 GPUs of 80 GB", fontsize=14)
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False, handlelength=1)
    figure.savefig(file, dpi=130)


def style_axes(axes: Any, rows: list[Row]) -> None:
    """Label the bars, mark the memory of a GPU and remove what is not needed."""
    notes = {method.name: method.note for method in METHODS}
    axes.set_yticks([])
    at_left = {"ha": "right", "va": "center"}
    for index, row in enumerate(rows):
        note = notes[row["method"]]
        axes.text(-1, index - 0.13, row["method"], fontsize=12, **at_left)
        axes.text(-1, index + 0.19, note, fontsize=8.5, color="#666666", **at_left)
    axes.axvline(GPU_MEMORY, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(GPU_MEMORY, -0.62, f"{GPU_MEMORY} GB", ha="center", va="bottom", fontsize=10)
    axes.set_xlim(0, 1.25 * GPU_MEMORY)
    axes.set_ylim(len(rows) - 0.5, -0.55)
    axes.set_xlabel("GB (10⁹ bytes), estimated by lit-align plan")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Plan the methods, write the table and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/pictures/memory_7b"),
        help="path of the .png and .csv files, without the suffix",
    )
    parser.add_argument("--csv", type=Path, help="draw from this table instead of new plans")
    options = parser.parse_args()
    if options.csv:
        rows = read(options.csv)
    else:
        with TemporaryDirectory() as folder:
            Path(folder, "from_scratch.yaml").write_text(FROM_SCRATCH)
            rows = [plan(method, Path(folder)) for method in METHODS]
        write(rows, options.output.with_suffix(".csv"))
    draw(rows, options.output.with_suffix(".png"))
    print(f"wrote {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()

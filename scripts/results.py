"""Train every online algorithm on one pretrained model and write the table of docs/results.md.

    OMP_NUM_THREADS=1 python scripts/results.py                # all, and writes the page
    OMP_NUM_THREADS=1 python scripts/results.py ReMax RTO      # these classes; only prints

Runs `lit-align` as a user would: a packaged config, docs/examples/stories.yaml over it, and the
options below. Model and stories come from the hub. `--config FILE` adds another overlay, such as
tests/real_data/stories.yaml, which reads local files. All runs are under runs/results.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning
import torch
import transformers
from compare_predictions import summarize
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.cli.main import main as lit_align
from lit_align.evaluation.statistics import read_predictions

PAGE = Path("docs/results.md")
OVERLAY = "docs/examples/stories.yaml"
PHASES = ("load", "rollout", "score", "prepare", "update")
NUM_MEASURED = 3  # iterations of the runs that measure memory
LORA = "--model.policy.lora.r 16 --model.policy.lora.lora_alpha 32"
VALUES = "--data.batch_size 128 --model.gae_lambda 1.0"
CRITIC = f"{VALUES} --model.critic_lr 2e-3 --model.critic_warmup_iterations 2"
HYDRA = f"{LORA} --model.policy.path {{folder}}/hydra_sft/hf --model.optimizer.lr 2e-3"


class Run(NamedTuple):
    """One row of the table.

    Args:
        name: Name of the algorithm's class.
        config: The packaged config.
        options: Further options; `{folder}` stands for the folder of all runs.
        note: What differs from other runs of the same class.
        start: The run whose responses to the held-out prompts are those before training.
    """

    name: str
    config: str
    options: str = ""
    note: str = ""
    start: str = "base"

    @property
    def title(self) -> str:
        """Return the class name and the note."""
        return f"{self.name}, {self.note}" if self.note else self.name

    @property
    def folder(self) -> str:
        """Return the name of the run folder."""
        return re.sub(r"\W+", "_", self.title)


RUNS = [
    Run("ReMax", "remax"),
    Run("GRPO", "grpo", "--model.kl_coef 0.2"),
    Run("GRPOVI", "grpovi", "--model.kl_coef 0.2 --model.min_score -1 --model.max_score 1"),
    Run("RLOO", "rloo"),
    Run("SPR", "spr", "--data PromptData --model.num_offline_samples 0"),
    Run("PPO", "ppo", CRITIC),
    Run("RTO", "rto", f"{CRITIC} --model.dpo_adapter {{folder}}/dpo/hf --model.dpo_coef 0.01"),
    Run(
        "PPO",
        "dynamic_lora_ppo",
        f"{CRITIC} {LORA} --model.critic.lora.r 16 --model.critic.lora.lora_alpha 32 "
        "--model.optimizer.lr 2e-3",
        "dynamic LoRA",
    ),
    Run("HydraPPO", "hydra_ppo", f"{CRITIC} {HYDRA}", start="hydra"),
    Run(
        "HydraPPO",
        "joint_hydra_ppo",
        f"{VALUES} {HYDRA} --model.value_coef 0.1",
        "one adapter",
        start="hydra",
    ),
]


class Clock(Callback):
    """Write `seconds.txt`: the median CPU time of an iteration, without the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *hook: Any) -> None:
        """Record the CPU time."""
        self.times.append(time.process_time())

    def on_train_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Write the median."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        Path(trainer.default_root_dir, "seconds.txt").write_text(f"{median(steps)}\n")


class Results:
    """Run all commands in one folder.

    Args:
        folder: Folder of all runs.
        num_batches: Iterations of each run. Default: those of the overlay.
        overlay: Another overlay, which is read after docs/examples/stories.yaml.
    """

    def __init__(self, folder: Path, num_batches: int | None = None, overlay: str | None = None):
        self.folder = folder
        self.overlays = f"--config {OVERLAY}" + (f" --config {overlay}" if overlay else "")
        self.limit = f" --trainer.limit_train_batches {num_batches}" if num_batches else ""

    def command(self, verb: str, config: str, name: str, options: str = "") -> Path:
        """Print a command of lit-align, run it, and return its run folder."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        line = f"{verb} --config {config} {self.overlays} --trainer.default_root_dir {place}"
        line = f"{line} {options.format(folder=self.folder)}"
        print(f"\n$ lit-align {line}", flush=True)
        with redirect_output(place / f"{verb}.log"):
            status = lit_align(line.split())
        if status:
            raise SystemExit(f"the command failed, see {place / f'{verb}.log'}")
        return place

    def generate(self, config: str, name: str, options: str = "") -> list[dict[str, Any]]:
        """Return a model's responses to the held-out prompts, with their scores."""
        return read_predictions(
            self.command("predict", config, name, options) / "predictions.jsonl"
        )

    def prepare(self) -> None:
        """Make preference pairs, and train a DPO adapter and a Hydra-SFT model on them."""
        before = self.generate("remax", "base")
        held_out = {row["prompt"] for row in before}
        more = "--data.eval_fraction 0.4 --seed_everything"
        first, second = (self.generate("remax", f"samples_{k}", f"{more} {k}") for k in (1, 2))
        found = [
            pair for pair in map(to_preference, first, second) if pair["prompt"] not in held_out
        ]
        pairs = self.folder / "pairs.jsonl"
        pairs.write_text("".join(f"{json.dumps(pair)}\n" for pair in found if pair["margin"] > 0.2))
        fit = f"--data.path {pairs} --trainer.max_epochs 1 --trainer.limit_train_batches 1.0"
        fit += " --trainer.limit_val_batches 1.0"
        self.command("fit", "dpo", "dpo", f"{fit} --config lora --model.optimizer.lr 2e-3")
        self.command("fit", "hydra_sft", "hydra_sft", f"{fit} --model.reward_loss_coef 1.0")
        hydra = f"{LORA} --model.policy.path {self.folder}/hydra_sft/hf"
        self.generate("hydra_ppo", "hydra", hydra)

    def row(self, run: Run) -> dict[str, Any]:
        """Train an algorithm, measure it, and return a row of the table."""
        measure = f"--trainer.limit_train_batches {NUM_MEASURED} --trainer.callbacks+ Memory"
        measured = self.command(
            "fit", run.config, f"{run.folder}/memory", f"{run.options} {measure}"
        )
        options = f"{run.options}{self.limit} --trainer.callbacks+ {CLOCK}"
        place = self.command("fit", run.config, run.folder, options)
        after = self.generate(run.config, run.folder, f"{run.options} --ckpt_path last")
        figures = summarize(read_predictions(self.folder / run.start / "predictions.jsonl"), after)
        return {
            "title": run.title,
            "seconds": float((place / "seconds.txt").read_text()),
            "peaks": read_peaks(measured / "memory.csv"),
            **figures,
        }


CLOCK = f"{Path(__file__).stem}.{Clock.__name__}"


@contextlib.contextmanager
def redirect_output(file: Path) -> Iterator[None]:
    """Write what is printed meanwhile to a file."""
    with (
        file.open("w", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def to_preference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return two responses to a prompt as a pair, in which the higher score is chosen."""
    worse, better = sorted((first, second), key=lambda row: float(row["score"]))
    return {
        "prompt": first["prompt"],
        "chosen": better["completion"],
        "rejected": worse["completion"],
        "margin": better["score"] - worse["score"],
    }


def read_peaks(file: Path) -> dict[str, float]:
    """Return MiB by phase, as the Memory callback wrote them."""
    with file.open() as rows:
        return {row["phase"]: int(row["peak"]) / 2**20 for row in csv.DictReader(rows)}


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: reward, KL, seconds and peak memory of each run."""
    names = ["algorithm", "reward", "gain, 95 % interval", "KL", "s per step", *PHASES]
    lines = [f"| {' | '.join(names)} |", "|-|" + "-|" * (len(names) - 1)]
    for row in rows:
        cells = [
            row["title"],
            f"{row['reward before']:.2f} -> {row['reward after']:.2f}",
            f"{row['gain, 95 % low']:.2f} to {row['gain, 95 % high']:.2f}",
            f"{row['KL after, nats per response']:.1f}",
            f"{row['seconds']:.2f}",
            *(f"{row['peaks'][phase]:.1f}" for phase in PHASES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_machine(overlay: str | None) -> str:
    """Return the command, the machine and the versions that made the figures."""
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, lightning))
    command = "OMP_NUM_THREADS=1 python scripts/results.py" + (
        f" --config {overlay}" if overlay else ""
    )
    return (
        f"Made by `{command}` in one run on {os.cpu_count()} CPU "
        f"cores, of which it used one; Python {platform.python_version()}, "
        f"{', '.join(versions)}, transformers {transformers.__version__}."
    )


def publish(text: str, page: Path = PAGE) -> None:
    """Replace the text between the two marks of the page."""
    begin, end = "<!-- made by scripts/results.py -->", "<!-- end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main(argv: list[str]) -> int:
    """Prepare, run and print. Return the number of runs whose gain may be chance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="classes of algorithms. Default: all")
    parser.add_argument("--config", help="another overlay, such as tests/real_data/stories.yaml")
    given = parser.parse_args(argv)
    started = time.monotonic()
    results = Results(Path("runs/results"), overlay=given.config)
    results.prepare()
    rows = []
    for run in RUNS:
        if not given.names or run.name in given.names:
            rows.append(results.row(run))
            print(make_table(rows[-1:]), flush=True)
    text = f"{make_table(rows)}\n\n{describe_machine(given.config)}"
    print(f"\n{text}\n\n{(time.monotonic() - started) / 60:.0f} minutes")
    if not given.names:
        publish(text)
    return sum(row["gain, 95 % low"] <= 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

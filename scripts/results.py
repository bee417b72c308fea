"""Every online algorithm on one pretrained model with one reward, and the table of docs/results.md.

    OMP_NUM_THREADS=1 python scripts/results.py                # all, and writes the page
    OMP_NUM_THREADS=1 python scripts/results.py ReMax RTO      # these classes; prints alone

Runs `lit-align` as a user would: packaged configs, docs/examples/stories.yaml over them, and the
words below. Needs ../shared/models and ../shared/data; everything else it makes is in runs/results.
"""

from __future__ import annotations

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
from compare_predictions import read_predictions, summarize
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.cli.main import main as lit_align

PAGE = Path("docs/results.md")
OVERLAY = "docs/examples/stories.yaml"
PHASES = ("load", "rollout", "score", "prepare", "update")
MEASURED = 3  # iterations of the runs that count bytes
LORA = "--model.policy.lora.r 16 --model.policy.lora.lora_alpha 32"
VALUED = "--data.batch_size 128 --model.gae_lambda 1.0"
CRITIC = f"{VALUED} --model.critic_lr 2e-3 --model.critic_warmup_iterations 2"
HYDRA = f"{LORA} --model.policy.path {{folder}}/hydra_sft/hf --model.optimizer.lr 2e-3"


class Run(NamedTuple):
    """One row of the table.

    Args:
        name: Of the algorithm's class.
        config: The packaged config.
        words: What the command line adds; `{folder}` is where all runs are.
        note: What tells it from other runs of the same class.
        start: The run that answers the held-out prompts before.
    """

    name: str
    config: str
    words: str = ""
    note: str = ""
    start: str = "base"

    @property
    def title(self) -> str:
        """Class and note."""
        return f"{self.name}, {self.note}" if self.note else self.name

    @property
    def folder(self) -> str:
        """The run folder's name."""
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
        "dl_ppo",
        f"{CRITIC} {LORA} --model.critic.lora.r 16 --model.critic.lora.lora_alpha 32 "
        "--model.optimizer.lr 2e-3",
        "dynamic LoRA",
    ),
    Run("HydraPPO", "hydra_ppo", f"{CRITIC} {HYDRA}", start="hydra"),
    Run(
        "HydraPPO",
        "joint_hydra_ppo",
        f"{VALUED} {HYDRA} --model.value_coef 0.1",
        "one adapter",
        start="hydra",
    ),
]


class Clock(Callback):
    """Writes `seconds.txt`: the median iteration's CPU time, without the first."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_batch_end(self, *hook: Any) -> None:
        """Notes the moment."""
        self.moments.append(time.process_time())

    def on_train_end(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Writes the median."""
        steps = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        Path(trainer.default_root_dir, "seconds.txt").write_text(f"{median(steps)}\n")


class Results:
    """All runs in one folder.

    Args:
        folder: Where.
        batches: Iterations of each run, if not the overlay's.
    """

    def __init__(self, folder: Path, batches: int | None = None):
        self.folder = folder
        self.short = f" --trainer.limit_train_batches {batches}" if batches else ""

    def command(self, verb: str, config: str, name: str, words: str = "") -> Path:
        """Shows a command of lit-align and runs it; where it has written."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        line = f"{verb} --config {config} --config {OVERLAY} --trainer.default_root_dir {place}"
        line = f"{line} {words.format(folder=self.folder)}"
        print(f"\n$ lit-align {line}", flush=True)
        with said_to(place / f"{verb}.log"):
            status = lit_align(line.split())
        if status:
            raise SystemExit(f"failed: {place / f'{verb}.log'} says why")
        return place

    def answers(self, config: str, name: str, words: str = "") -> list[dict[str, Any]]:
        """What a model answers to prompts that nothing was trained on, with its scores."""
        return read_predictions(self.command("predict", config, name, words) / "predictions.jsonl")

    def prepare(self) -> None:
        """VADER's preferences, and what they train: a DPO adapter and a two-headed model."""
        before = self.answers("remax", "base")
        held_out = {row["prompt"] for row in before}
        more = "--data.eval_fraction 0.4 --seed_everything"
        one, other = (self.answers("remax", f"answers_{k}", f"{more} {k}") for k in (1, 2))
        found = [pair for pair in map(preferred, one, other) if pair["prompt"] not in held_out]
        pairs = self.folder / "pairs.jsonl"
        pairs.write_text("".join(f"{json.dumps(pair)}\n" for pair in found if pair["margin"] > 0.2))
        fit = f"--data.path {pairs} --trainer.max_epochs 1 --trainer.limit_train_batches 1.0"
        fit += " --trainer.limit_val_batches 1.0"
        self.command("fit", "dpo", "dpo", f"{fit} --config lora --model.optimizer.lr 2e-3")
        self.command("fit", "hydra_sft", "hydra_sft", f"{fit} --model.reward_loss_coef 1.0")
        self.answers("hydra_ppo", "hydra", f"{LORA} --model.policy.path {self.folder}/hydra_sft/hf")

    def row(self, run: Run) -> dict[str, Any]:
        """Trains an algorithm and measures it; a row of the table."""
        measured = f"--trainer.limit_train_batches {MEASURED} --trainer.callbacks+ Memory"
        counted = self.command("fit", run.config, f"{run.folder}/memory", f"{run.words} {measured}")
        words = f"{run.words}{self.short}"
        place = self.command("fit", run.config, run.folder, f"{words} --trainer.callbacks+ {CLOCK}")
        after = self.answers(run.config, run.folder, f"{run.words} --ckpt_path last")
        figures = summarize(read_predictions(self.folder / run.start / "predictions.jsonl"), after)
        return {
            "title": run.title,
            "seconds": float((place / "seconds.txt").read_text()),
            "peaks": peaks(counted / "memory.csv"),
            **figures,
        }


CLOCK = f"{Path(__file__).stem}.{Clock.__name__}"


@contextlib.contextmanager
def said_to(file: Path) -> Iterator[None]:
    """What is printed meanwhile goes to a file."""
    with (
        file.open("w", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def preferred(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two answers to a prompt as a preference for the one with the higher score."""
    worse, better = sorted((one, other), key=lambda row: float(row["score"]))
    return {
        "prompt": one["prompt"],
        "chosen": better["completion"],
        "rejected": worse["completion"],
        "margin": better["score"] - worse["score"],
    }


def peaks(file: Path) -> dict[str, float]:
    """MiB by phase, as the Memory callback has written them."""
    with file.open() as rows:
        return {row["phase"]: int(row["peak"]) / 2**20 for row in csv.DictReader(rows)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: reward, KL, seconds and peak memory of each run."""
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


def machine() -> str:
    """What the figures were made on and with."""
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, lightning))
    return (
        f"Made by `OMP_NUM_THREADS=1 python scripts/results.py` in one run on {os.cpu_count()} CPU "
        f"cores, of which it used one; Python {platform.python_version()}, "
        f"{', '.join(versions)}, transformers {transformers.__version__}."
    )


def publish(text: str, page: Path = PAGE) -> None:
    """Puts the table between the page's two marks."""
    begin, end = "<!-- made by scripts/results.py -->", "<!-- end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main(names: list[str]) -> int:
    """Prepares, runs, prints; the number of runs whose gain may be chance."""
    started, results = time.monotonic(), Results(Path("runs/results"))
    chosen = [run for run in RUNS if not names or run.name in names]
    results.prepare()
    rows = []
    for run in chosen:
        rows.append(results.row(run))
        print(table(rows[-1:]), flush=True)
    text = f"{table(rows)}\n\n{machine()}"
    print(f"\n{text}\n\n{(time.monotonic() - started) / 60:.0f} minutes")
    if not names:
        publish(text)
    return sum(row["gain, 95 % low"] <= 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

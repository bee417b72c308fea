"""SFT from random weights, a reward model from pairs, ReMax with that reward model; then a table.

Runs the command line as a user would, five times, and needs no network. Everything it makes is
under runs/quickstart: metrics, curves, completions, and each model as a transformers folder.
"""

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_align.data.toy import parses

RUNS = Path("runs/quickstart")
SFT, REWARD, REMAX = RUNS / "1_sft", RUNS / "2_reward_model", RUNS / "3_remax"
BEFORE, AFTER = RUNS / "before", RUNS / "after"

Answers = list[dict[str, object]]


def lit_align(*words: object) -> None:
    """Shows a command and runs it; one thread, since so small a model gains nothing from two."""
    line = [str(word) for word in words]
    print(f"\n$ lit-align {' '.join(line)}", flush=True)
    command = [sys.executable, "-m", "lit_align.cli.main", *line]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train() -> None:
    """The three fits, and answers of the SFT and of the aligned model to held-out prompts."""
    toy = ("--config", "toy", "--trainer.default_root_dir")
    reward = ("--reward.sources", "LearnedReward", "--reward.sources.path", REWARD / "hf")
    lit_align("fit", "--config", "sft", *toy, SFT, "--model.optimizer.lr", 8e-3,
              "--data.batch_size", 32, "--trainer.max_epochs", 12,
              "--trainer.check_val_every_n_epoch", 12)  # fmt: skip
    lit_align("fit", "--config", "reward_model", *toy, REWARD, "--model.optimizer.lr", 4e-3,
              "--model.reward_model.path", SFT / "hf", "--trainer.max_epochs", 4)  # fmt: skip
    lit_align("fit", "--config", "remax", *toy, REMAX, "--model.optimizer.lr", 2e-3,
              "--model.policy.path", SFT / "hf", *reward)  # fmt: skip
    for model, folder in ((SFT, BEFORE), (REMAX, AFTER)):
        lit_align("predict", "--config", "remax", *toy, folder,
                  "--model.policy.path", model / "hf", "--model.reference", "Policy",
                  "--model.reference.path", SFT / "hf", *reward)  # fmt: skip


def read(folder: Path) -> Answers:
    """The answers that a `predict` wrote."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


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
    """The figures by which the quickstart is judged."""
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
        "parses before": mean([parses(r["prompt"], r["completion"]) for r in before]),
        "parses after": mean([parses(r["prompt"], r["completion"]) for r in after]),
        "distinct-2 before": distinct_2(before),
        "distinct-2 after": distinct_2(after),
    }


def show(before: Answers, after: Answers, figures: dict[str, float], seconds: float) -> None:
    """Prints the table of completions and the figures, and keeps both in the run folder."""
    rows = Table(title="Held-out prompts, before and after", show_lines=True)
    for name in ("prompt", "SFT", "reward", "aligned", "reward", "KL"):
        rows.add_column(name, justify="right" if name in ("reward", "KL") else "left")
    for old, new in list(zip(before, after, strict=True))[:6]:
        rows.add_row(old["prompt"], old["completion"], f"{old['score']:.2f}",
                     new["completion"], f"{new['score']:.2f}", f"{new['kl']:.1f}")  # fmt: skip
    numbers = Table(title=f"After {seconds:.0f} s")
    for name in ("figure", "value"):
        numbers.add_column(name, justify="right" if name == "value" else "left")
    for name, value in figures.items():
        numbers.add_row(name, f"{value:.4g}")
    with (RUNS / "table.txt").open("w") as file:
        for console in (Console(width=120), Console(width=120, file=file)):
            console.print(rows, numbers)
    (RUNS / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def check(figures: dict[str, float]) -> list[str]:
    """What the run did not reach."""
    wanted = {
        "a gain of one standard deviation": figures["gain in standard deviations"] >= 1,
        "a gain above 0 with 95 % certainty": figures["gain, 95 % low"] > 0,
        "at most 20 nats per response": figures["KL after, nats per response"] <= 20,
        "95 % grammatical answers": figures["parses after"] >= 0.95,
        "half of the SFT model's distinct-2":
            figures["distinct-2 after"] >= figures["distinct-2 before"] / 2,
    }  # fmt: skip
    return [name for name, reached in wanted.items() if not reached]


def main() -> int:
    """Trains, shows, and says what was not reached."""
    started = time.monotonic()
    train()
    before, after = read(BEFORE), read(AFTER)
    figures = summarise(before, after)
    show(before, after, figures, time.monotonic() - started)
    print(f"curves: {REMAX / 'curves.png'}   table: {RUNS / 'table.txt'}")
    missed = check(figures)
    if missed:
        print(f"not reached: {', '.join(missed)}", file=sys.stderr)
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())

"""Quickstart: SFT from random weights, a reward model from pairs, and ReMax with both.

The script runs the command line five times, as a user would, and needs no network. All files are
under runs/quickstart: metrics, curves, completions, and each model as a transformers folder.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from compare_predictions import summarize
from rich.console import Console

from lit_align.data.toy import is_grammatical
from lit_align.evaluation.statistics import ResponseRows, mean, read_predictions
from lit_align.evaluation.tables import completions_table, statistics_table

RUNS = Path("runs/quickstart")
SFT, REWARD, REMAX = RUNS / "1_sft", RUNS / "2_reward_model", RUNS / "3_remax"
BEFORE, AFTER = RUNS / "before", RUNS / "after"


def lit_align(*args: object) -> None:
    """Print a command and run it with one thread, because a second does not speed up this model."""
    line = [str(arg) for arg in args]
    print(f"\n$ lit-align {' '.join(line)}", flush=True)
    command = [sys.executable, "-m", "lit_align.cli.main", *line]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train() -> None:
    """Train three models and sample responses of the first and the last to held-out prompts."""
    toy = ("--config", "toy", "--trainer.default_root_dir")
    reward = ("--reward.functions", "ModelReward", "--reward.functions.path", REWARD / "hf")
    lit_align("fit", "--config", "sft", *toy, SFT, "--model.optimizer.lr", 8e-3,
              "--data.batch_size", 32, "--trainer.max_epochs", 12,
              "--trainer.check_val_every_n_epoch", 12)  # fmt: skip
    lit_align("fit", "--config", "reward_model", *toy, REWARD, "--model.optimizer.lr", 4e-3,
              "--model.reward_model.path", SFT / "hf", "--trainer.max_epochs", 4)  # fmt: skip
    lit_align("fit", "--config", "remax", *toy, REMAX, "--model.optimizer.lr", 2e-3,
              "--model.kl_coef", 0.1, "--model.policy.path", SFT / "hf", *reward)  # fmt: skip
    for model, folder in ((SFT, BEFORE), (REMAX, AFTER)):
        lit_align("predict", "--config", "remax", *toy, folder,
                  "--model.policy.path", model / "hf", "--model.reference", "Policy",
                  "--model.reference.path", SFT / "hf", *reward)  # fmt: skip


def measure(before: ResponseRows, after: ResponseRows) -> dict[str, float]:
    """Return the figures that decide if the quickstart succeeded."""
    grammar = {
        f"parses {when}": mean(
            [is_grammatical(str(r["prompt"]), str(r["completion"])) for r in rows]
        )
        for when, rows in (("before", before), ("after", after))
    }
    return {**summarize(before, after), **grammar}


def print_results(
    before: ResponseRows, after: ResponseRows, figures: dict[str, float], seconds: float
) -> None:
    """Print the tables of completions and figures, and write both to the run folder."""
    rows = completions_table(before, after)
    table = statistics_table(figures, f"After {seconds:.0f} s")
    with (RUNS / "table.txt").open("w") as file:
        for console in (Console(width=120), Console(width=120, file=file)):
            console.print(rows, table)
    (RUNS / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def missed_goals(figures: dict[str, float]) -> list[str]:
    """Return the goals that the run did not reach."""
    goals = {
        "a gain of one standard deviation": figures["gain in standard deviations"] >= 1,
        "a gain above 0 with 95 % certainty": figures["gain, 95 % low"] > 0,
        "at most 20 nats per response": figures["KL after, nats per response"] <= 20,
        "95 % grammatical responses": figures["parses after"] >= 0.95,
        "half of the SFT model's distinct-2":
            figures["distinct-2 after"] >= figures["distinct-2 before"] / 2,
    }  # fmt: skip
    return [name for name, reached in goals.items() if not reached]


def main() -> int:
    """Train, print the results and return the number of goals that were not reached."""
    started = time.monotonic()
    train()
    before, after = (read_predictions(folder / "predictions.jsonl") for folder in (BEFORE, AFTER))
    figures = measure(before, after)
    print_results(before, after, figures, time.monotonic() - started)
    print(f"curves: {REMAX / 'curves.png'}   table: {RUNS / 'table.txt'}")
    missed = missed_goals(figures)
    if missed:
        print(f"not reached: {', '.join(missed)}", file=sys.stderr)
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())

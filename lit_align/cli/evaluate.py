"""`lit-align evaluate`: compare several models on the same prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_align.cli.argument_parser import ArgumentParser

ABOUT = "Compare models on the same prompts: reward, KL, win rate, diversity, exact match, pass@k."
SECTIONS = """
sections of `lit-align fit` (lit-align fit --data.help PromptData lists the settings of one):
  --config FILE         config of a run, or a packaged one, for data, reward and rollout
  --data.path PATH      data set with the prompts, and other settings of PromptData
  --reward.functions R  reward functions, and other settings of Reward
  --rollout.SETTING     response length, sampling and number of samples: settings of Rollout
"""


def main(argv: list[str]) -> int:
    """Parse the words after `evaluate`, query each model, print a table and write JSON.

    Args:
        argv: The words after `evaluate`.
    """
    if {"--help", "-h"} & set(argv):
        return print_help()
    from lit_align.cli.discovery import import_all
    from lit_align.cli.errors import silence_known_warnings
    from lit_align.cli.evaluate_run import run_evaluation

    silence_known_warnings()
    import_all()
    sys.path.insert(0, str(Path.cwd()))  # a user's own rewards, as python itself would find them
    return run_evaluation(argv, add_options)


def print_help() -> int:
    """Print the help without importing what the sections need; return the exit status 0."""
    parser = ArgumentParser(
        prog="lit-align evaluate",
        description=ABOUT,
        epilog=SECTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.print_help()
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are not sections.

    Args:
        parser: argparse's for the help, jsonargparse's for a run.
    """
    add = parser.add_argument
    add("models", nargs="+", type=str, metavar="MODEL",
        help="Hub ids or folders; the others are compared with the first.")  # fmt: skip
    add("--judge", type=str, default=None, metavar="COMMAND",
        help="Command that reads pairs of responses as JSON lines and prints a, b or tie for "
        "each.")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="Sampling temperature of all models.")
    add("--reference", type=str, default=None, metavar="MODEL",
        help="Reference model of the KL. Default: the first model.")  # fmt: skip
    add("--out", type=str, default="evaluation.json", metavar="FILE", help="JSON file to write.")
    add("--seed", type=int, default=0, help="Random seed.")
    add("--accelerator", type=str, default="auto", help="Lightning's name, such as cpu or gpu.")
    add("--precision", type=str, default="32-true", help="Lightning's name, such as bf16-true.")
    add("--tasks", type=str, default="", metavar="A,B", help="Tasks of lm-eval.")
    add("--tasks_limit", type=int, default=None, metavar="N",
        help="Documents of each task. Default: all.")  # fmt: skip
    add("--tasks_folder", type=str, default=None, metavar="FOLDER",
        help="Folder of YAML files that define more tasks.")  # fmt: skip

"""`lit-align plan`: whether a run fits, before a GPU is rented for it."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lit_align.cli.argument_parser import Words
from lit_align.cli.discovery import open_rooms
from lit_align.cli.errors import quieten
from lit_align.cli.overlays import fit_overlays
from lit_align.cli.plan_run import PlannedCLI
from lit_align.cli.sweep import SIZES, Size, sweep
from lit_align.models.weights.loading import quiet_transformers
from lit_align.plan.architectures import config_of
from lit_align.plan.simulate import simulated
from lit_align.plan.suggestions import candidates, changes
from lit_align.plan.table import GIB, Plan, as_json, table, verdict

ABOUT = (
    "Peak memory of a run by phase, from the real code on tensors without values: no GPU, no "
    "weights, no data, no network. Takes all that `lit-align fit` takes, and paths such as "
    "shape:llama-3-8b or a config.json. Status 0: fits, 1: does not, 2: bad input."
)
PHASES = ("load", "rollout", "score", "prepare", "update")
EVEN = 0.01  # share of the peak by which traces of few blocks may miss a line
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def main(args: list[str]) -> int:
    """Parses the words behind `plan`, simulates, prints."""
    given, words = parser().parse_known_args(args)
    quieten()
    open_rooms()
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as for `fit`
    with silent(), quiet_transformers():
        return swept(given, words) if given.sweep else asked(words, given)


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is heard of a run that is none, but its errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def asked(words: list[str], given: argparse.Namespace) -> int:
    """One run, and if it does not fit, small changes of it.

    Args:
        words: As of `fit`.
        given: The arguments of `plan`.
    """
    cli, plan = planned(words, given)
    if not given.json:
        Console(width=max(Console().width, 110)).print(table(plan))
        print(verdict(plan))
    others = [] if plan.fits else tried(words, given, cli)
    if given.json:
        print(json.dumps({**as_json(plan), "changes": others}))
    return 0 if plan.fits else 1


def planned(words: list[str], given: argparse.Namespace) -> tuple[PlannedCLI, Plan]:
    """A run, and what it takes.

    Args:
        words: As of `fit`.
        given: The arguments of `plan`.
    """
    cli = PlannedCLI(fit_overlays(words), given.prompt_tokens)
    machine = cli.machine._replace(memory=given.gpu)
    return cli, Plan(simulated(cli.build, machine), given.gpu)


def tried(words: list[str], given: argparse.Namespace, cli: PlannedCLI) -> list[dict[str, object]]:
    """Small changes of a run that does not fit, each printed as soon as it is known.

    Args:
        words: As of `fit`.
        given: The arguments of `plan`.
        cli: The run as it is.
    """
    found: list[dict[str, object]] = []
    more = list(candidates(cli.config.fit, cli.machine.ranks))
    for change in changes(more, lambda added: planned([*words, *added], given)[1]):
        line, plan = " ".join(change.words), change.plan
        told = f"refused: {plan}" if isinstance(plan, str) else verdict(plan)
        size = {} if isinstance(plan, str) else {"peak": plan.peak[1].total, "phase": plan.peak[0]}
        found.append({"words": line, "fits": change.fits, "told": told, **size})
        if not given.json:
            print(f"  with {line}: {told}", flush=True)
    return found


def swept(given: argparse.Namespace, words: list[str]) -> int:
    """Every method at one size, a line each as soon as it is known."""
    lines = []
    for line in sweep(sweeping(given, words), given.gpu):
        lines.append(line)
        peaks = {phase: line.peak(phase) for phase in PHASES}
        row = {"method": line.method, "by": line.by, **peaks, "bent": line.grown.bent}
        shown = "  ".join(f"{phase} {peak / GIB:6.2f}" for phase, peak in peaks.items())
        if line.grown.bent > EVEN:
            shown += f"  too low: blocks do not grow evenly, by {line.grown.bent:.1%}"
        print(
            json.dumps(row) if given.json else f"{line.method:<16}{line.by:<8} {shown}", flush=True
        )
    return int(any(max(map(line.peak, PHASES)) > given.gpu for line in lines))


def sweeping(given: argparse.Namespace, words: list[str]) -> Size:
    """The model and the machines that methods are compared at.

    Args:
        given: The arguments of `plan`.
        words: Behind them, of which a sweep takes these few.
    """
    size = SIZES[given.sweep]
    own = Words(prog="lit-align plan", allow_abbrev=False)
    own.add_argument("--model.policy.path", dest="path", default=size.path)
    own.add_argument("--trainer.devices", dest="devices", type=int, default=size.devices)
    own.add_argument("--trainer.num_nodes", dest="nodes", type=int, default=size.nodes)
    own.add_argument("--rollout.max_new_tokens", dest="answer", type=int, default=size.answer)
    found, others = own.parse_known_args(words)
    if others:
        raise ValueError(f"--sweep has settings of its own and takes no {others[0]}.")
    config_of(found.path)  # refuses what is no model
    gather = size.gather if found.path == size.path else None
    prompt = given.prompt_tokens or size.prompt
    return Size(**vars(found), gather=gather, sum_once=size.sum_once, prompt=prompt)


def parser() -> Words:
    """The arguments of `plan` alone."""
    words = Words(prog="lit-align plan", description=ABOUT, allow_abbrev=False)
    help_of = {
        "gpu": "Memory of a GPU: a number and GB (10^9 bytes) or GiB (2^30).",
        "prompt_tokens": "Tokens of each prompt, or text; by default the most that data allow.",
        "sweep": "Compares all methods at Llama 2 7B on 8 GPUs or 70B on 64, 512 + 512 tokens, or "
        "at the --model.policy.path, --prompt_tokens, --rollout.max_new_tokens, --trainer.devices "
        "and --trainer.num_nodes that are given.",
        "json": "All bytes, for machines.",
    }
    words.add_argument("--gpu", type=size, default="80GB", metavar="80GB", help=help_of["gpu"])
    words.add_argument("--prompt_tokens", type=int, help=help_of["prompt_tokens"])
    words.add_argument("--json", action="store_true", help=help_of["json"])
    words.add_argument(
        "--sweep", nargs="?", const="7b", choices=sorted(SIZES), help=help_of["sweep"]
    )
    return words


def size(text: str) -> int:
    """Bytes of a text such as 80GB."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})?", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text} is no size; give a number and GB, as in 80GB")
    return int(float(found[1]) * UNITS[found[2] or "GB"])

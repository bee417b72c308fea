"""Seconds and bytes of a step: beside TRL, beside a bare loop, and as sizes grow.

    python scripts/bench_speed.py            # 1 M and 7 M parameters on the CPU
    python scripts/bench_speed.py --quick    # 1 M alone, beside TRL alone
    python scripts/bench_speed.py --device cuda --models 0.5B 1.5B --parts trl loop papers limits

What is compared takes turns, a step each. `clock` and `work` say how many times more samples a
second lit_align makes: by the clock, and by the seconds that the process had a processor, which
other processes of the machine disturb less. `memory` is lit_align's peak over the other's, above
what a process holds once everything is imported. TRL comes with the extra `bench`.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import datasets
import torch
import transformers
from bench import growth, limits, loop, material, ours, papers
from bench.case import OFFLINE, ONLINE, Case, shapes
from bench.memory import apart, peak
from bench.turns import Seconds, seconds

Side = Callable[..., None]  # of (case, folder, steps, stepped)
HEAD = "               model shape    clock   work  memory  MiB  other MiB  seconds  other"


def quiet() -> None:
    """No progress bars and no advice."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def written(case: Case, folder: Path, steps: int) -> None:
    """What the runs read."""
    material.make(case, folder, steps)
    papers.prepare(folder)


def timed(case: Case, folder: Path, sides: list[Side], rounds: int) -> list[list[Seconds]]:
    """Seconds of each step of each side, in turns."""
    return seconds([partial(side, case, folder) for side in sides], rounds)


def weighed(case: Case, folder: Path, side: Side) -> int:
    """Peak bytes of two steps of one side."""
    return peak(lambda: side(case, folder, 2, lambda: None), case.device)


def compare(name: str, case: Case, sides: list[Side], rounds: int) -> None:
    """Prints one line: the first side beside the second, each measurement in a new process."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        apart(written, case, folder, rounds + 2)
        spent = apart(timed, case, folder, sides, rounds)
        mine, its = (apart(weighed, case, folder, side) for side in sides)
    one, other = (list(zip(*side, strict=True)) for side in spent)
    clock, work = (median(b) / median(a) for a, b in zip(one, other, strict=True))
    print(
        f"{name:<14} {case.model:>5} {case.shape.name:<7} {clock:>6.2f} {work:>6.2f} "
        f"{mine / its:>7.2f} {mine / 2**20:>4.0f} {its / 2**20:>10.0f} "
        f"{median(one[1]):>8.2f} {median(other[1]):>6.2f}",
        flush=True,
    )


def beside_trl(args: argparse.Namespace) -> None:
    """lit_align beside TRL."""
    from bench import theirs  # only where TRL is installed

    print(f"beside TRL\n{HEAD}")
    for model in args.models:
        for algorithm in args.algorithms:
            for shape in shapes(algorithm, args.device):
                case = Case(algorithm, model, shape, args.device)
                compare(algorithm, case, [ours.run, theirs.run], args.rounds)


def beside_loop(args: argparse.Namespace) -> None:
    """lit_align beside the same maths without a Trainer."""
    print(f"beside a bare loop\n{HEAD}")
    for algorithm in ("grpo", "sft"):
        case = Case(algorithm, args.models[-1], shapes(algorithm, args.device)[0], args.device)
        compare(algorithm, case, [ours.run, loop.run], args.rounds)


def paper_claims(args: argparse.Namespace) -> None:
    """One algorithm beside another, a sample per prompt as the papers have it."""
    print(f"what papers claim\n{HEAD}")
    for one, other in papers.CLAIMS:
        for shape in shapes("grpo", args.device):
            alone = shape._replace(num_samples=1)
            case = Case("grpo", args.models[-1], alone, args.device)
            sides: list[Side] = [partial(papers.run, name) for name in (one, other)]
            compare(f"{one} / {other}"[:14], case, sides, args.rounds)


def growing(args: argparse.Namespace) -> None:
    """The picture of how cost grows."""
    growth.save(growth.measure(), Path(args.picture))


def near_limits(args: argparse.Namespace) -> None:
    """Shares of what the device can do, and the price of greedy rows."""
    print("near the device's limits")
    for model in args.models:
        limits.report(Case("grpo", model, shapes("grpo", args.device)[0], args.device))


PARTS = {
    "trl": beside_trl,
    "loop": beside_loop,
    "papers": paper_claims,
    "growth": growing,
    "limits": near_limits,
}


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["1M", "7M"])
    parser.add_argument("--algorithms", nargs="+", default=[*ONLINE, *OFFLINE])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["trl", "loop", "papers"])
    parser.add_argument("--picture", default="docs/pictures/growth.png")
    parser.add_argument("--quick", action="store_true", help="the smallest model beside TRL")
    args = parser.parse_args()
    if args.quick:
        args.models, args.parts = args.models[:1], ["trl"]
    torch.set_num_threads(1)
    quiet()
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()

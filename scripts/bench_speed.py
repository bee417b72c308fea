"""Compare seconds and bytes of a step with TRL, with a bare loop, and as sizes grow.

    python scripts/bench_speed.py            # 1 M and 7 M parameters on the CPU
    python scripts/bench_speed.py --quick    # only 1 M, only TRL
    python scripts/bench_speed.py --device cuda --models 0.5B 1.5B --parts trl papers limits

The two sides alternate step by step. `clock` and `work` are the ratios of samples per second, by
the clock and by CPU time. Other processes disturb CPU time less. `memory` is the ratio of the peak
bytes, without those of a process that has only imported everything. TRL is in the extra `bench`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
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
from bench import data, growth, limits, lit_align_side, loop, papers
from bench.case import OFFLINE, ONLINE, Case, shapes
from bench.interleave import Step, interleave_steps
from bench.memory import peak, run_in_fork

Side = Callable[..., None]  # takes (case, folder, steps, after_step)
HEAD = "               model shape    clock   work  memory   MiB other MiB  seconds  other"


def disable_output() -> None:
    """Disable progress bars, warnings and logs."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def write_files(case: Case, folder: Path, steps: int) -> None:
    """Write the files that the runs read."""
    data.write_files(case, folder, steps)


def time_steps(case: Case, folder: Path, sides: list[Side], rounds: int) -> list[list[Step]]:
    """Return each step of each side, measured in turns."""
    return interleave_steps([partial(side, case, folder) for side in sides], rounds)


def measure_peak(case: Case, folder: Path, side: Side) -> int:
    """Return the peak bytes of two steps of one side."""
    return peak(lambda: side(case, folder, 2, lambda: None), case.device)


def print_comparison(
    name: str, case: Case, sides: list[Side], args: argparse.Namespace, times: int = 1
) -> None:
    """Print one line that compares two sides.

    On a CPU each measurement runs in its own process. A GPU's allocator counts each side alone.

    Args:
        name: Name of the line.
        case: Work of both sides.
        sides: Two runs.
        args: Arguments of the command line.
        times: Samples per step of the first side divided by those of the second.
    """
    folder = Path(args.folder) / case.folder_name
    run_in_fork(write_files, case, folder, args.rounds + 2)
    try:
        one, other = run_in_fork(time_steps, case, folder, sides, args.rounds)
    except RuntimeError as failure:  # its traceback is printed above
        print(f"{name:<14} {case.model:>5} {case.shape.name:<7} {failure}", flush=True)
        args.failed = True
        return
    if case.device == "cpu":
        mine, its = (run_in_fork(measure_peak, case, folder, side) for side in sides)
    else:
        mine, its = (max(step.bytes for step in steps) for steps in (one, other))
    clock, its_clock = (median(step.clock for step in steps) for steps in (one, other))
    work, its_work = (median(step.work for step in steps) for steps in (one, other))
    faster = times * its_clock / clock, times * its_work / work
    print(
        f"{name:<14} {case.model:>5} {case.shape.name:<7} {faster[0]:>6.2f} {faster[1]:>6.2f} "
        f"{mine / its:>7.2f} {mine / 2**20:>5.0f} {its / 2**20:>9.0f} "
        f"{clock:>8.2f} {its_clock:>6.2f}",
        flush=True,
    )


def compare_with_trl(args: argparse.Namespace) -> None:
    """Compare lit_align with TRL."""
    from bench import trl_side  # only where TRL is installed

    print(f"compared with TRL\n{HEAD}")
    for model in args.models:
        for algorithm in args.algorithms:
            for shape in shapes(algorithm, args.device):
                case = Case(algorithm, model, shape, args.device)
                print_comparison(algorithm, case, [lit_align_side.run, trl_side.run], args)


def compare_with_batching(args: argparse.Namespace) -> None:
    """Compare with TRL that generates by transformers' continuous batching."""
    from bench import trl_side

    print(f"compared with TRL with continuous batching\n{HEAD}")
    for model in args.models:
        for shape in shapes("grpo", args.device):
            case = Case("grpo", model, shape, args.device)
            print_comparison(
                "grpo", case, [lit_align_side.run, partial(trl_side.run, batched=True)], args
            )


def compare_with_loop(args: argparse.Namespace) -> None:
    """Compare with the same computation without a Trainer."""
    print(f"compared with a bare loop\n{HEAD}")
    for algorithm in ("grpo", "sft"):
        case = Case(algorithm, args.models[-1], shapes(algorithm, args.device)[0], args.device)
        print_comparison(algorithm, case, [lit_align_side.run, loop.run], args)


def check_paper_claims(args: argparse.Namespace) -> None:
    """Compare two algorithms, with one sample per prompt as in the papers."""
    print(f"what papers claim\n{HEAD}")
    for one, other in papers.CLAIMS:
        for shape in shapes("grpo", args.device):
            case = Case("grpo", args.models[-1], shape._replace(num_samples=1), args.device)
            prepare_case(case, args)
            sides: list[Side] = [partial(papers.run, name) for name in (one, other)]
            print_comparison(f"{one} / {other}"[:14], case, sides, args)
    compare_at_equal_memory(args)


def prepare_case(case: Case, args: argparse.Namespace) -> Path:
    """Write all files that the papers' algorithms read, and return the folder."""
    folder = Path(args.folder) / case.folder_name
    run_in_fork(write_files, case, folder, args.rounds + 2)
    run_in_fork(papers.prepare, folder)
    return folder


def compare_at_equal_memory(args: argparse.Namespace) -> None:
    """Compare LoRA-PPO with Hydra-PPO of as many rows as fit into the same bytes."""
    shape = shapes("grpo", args.device)[0]._replace(
        num_samples=1, num_rows=4, rows_per_microbatch=1
    )
    few = Case("grpo", args.models[-1], shape, args.device)

    def larger(times: int) -> Case:
        return few._replace(shape=shape._replace(num_rows=times * shape.num_rows))

    def fits(times: int) -> bool:
        folder = prepare_case(larger(times), args)
        return (
            run_in_fork(measure_peak, larger(times), folder, partial(papers.run, "hydra_ppo"))
            <= most
        )

    lora: Side = partial(papers.run_case, few, "lora_ppo")
    most = run_in_fork(measure_peak, few, prepare_case(few, args), lora)
    times = papers.largest_fitting_factor(fits)
    print(f"hydra_ppo with {times * shape.num_rows} rows, lora_ppo with {shape.num_rows}:")
    print_comparison(
        "per sample", larger(times), [partial(papers.run, "hydra_ppo"), lora], args, times
    )


def draw_growth(args: argparse.Namespace) -> None:
    """Draw how the cost grows."""
    growth.save_picture(growth.measure_points(), Path(args.picture))


def report_limits(args: argparse.Namespace) -> None:
    """Print percentages of the device's limits, and the cost of greedy rows."""
    print("near the device's limits")
    for model in args.models:
        limits.report(Case("grpo", model, shapes("grpo", args.device)[0], args.device))


BENCHMARKS = {
    "trl": compare_with_trl,
    "batching": compare_with_batching,
    "loop": compare_with_loop,
    "papers": check_paper_claims,
    "growth": draw_growth,
    "limits": report_limits,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["1M", "7M"])
    parser.add_argument("--algorithms", nargs="+", default=[*ONLINE, *OFFLINE])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=BENCHMARKS, default=["trl", "loop", "papers"])
    parser.add_argument("--picture", default="docs/pictures/growth.png")
    parser.add_argument(
        "--quick", action="store_true", help="compare only the smallest model with TRL"
    )
    args = parser.parse_args()
    args.failed = False
    if args.quick:
        args.models, args.parts = args.models[:1], ["trl"]
    torch.set_num_threads(1)
    disable_output()
    with tempfile.TemporaryDirectory() as args.folder:
        for part in args.parts:
            BENCHMARKS[part](args)
    sys.exit(int(args.failed))


if __name__ == "__main__":
    main()

"""Compare the estimates of `lit-align plan` with the allocator's peaks in a fit of two steps.

    python scripts/plan_accuracy.py --plans plans.json              # any machine: only the plans
    python scripts/plan_accuracy.py --plans plans.json --measured   # a machine with a GPU: both
    python scripts/plan_accuracy.py --model toy --device cpu --measured

Each plan and each fit runs in its own process. Every line is printed as soon as it is known, in
GiB. If a method fails, its error is printed and the others continue. Exit status 1 means that a
method has failed, or that a plan is off by more than `--within`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

PHASE_ORDER = ("load", "rollout", "score", "prepare", "update")
METHODS = "SFT SFT-checkpointing SFT-GaLore DPO RewardModel GRPO ReMax SPR PPO LoRA-PPO Hydra-PPO"
GIB = 2**30  # bytes
Phases = dict[str, int]  # bytes by phase


class ProcessDiedError(RuntimeError):
    """Error of a subprocess, with the last line that it printed."""


def run_in_subprocess(action: str, name: str, args: argparse.Namespace) -> Phases:
    """Return the bytes by phase from a new process.

    Args:
        action: planned or measured.
        name: Name of the method.
        args: Options of the command line.
    """
    argv = [sys.executable, __file__, "--one", action, "--methods", name]
    argv += ["--model", args.model, "--device", args.device]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=args.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise ProcessDiedError(
            f"not finished after {args.seconds} seconds. Set --seconds."
        ) from None
    if done.returncode:
        raise ProcessDiedError(
            next(iter(done.stderr.strip().splitlines()[-1:]), f"{done.returncode}")
        )
    found: Phases = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here(action: str, name: str, args: argparse.Namespace) -> Phases:
    """Return the bytes by phase, computed in this process.

    Args:
        action: planned or measured.
        name: Name of the method.
        args: Options of the command line.
    """
    # Before torch is imported: no download, and no message of the profiler.
    os.environ |= {"HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"}
    if action == "planned":
        from bench.planned import planned as work
    else:
        from bench.accuracy import measured as work
    with tempfile.TemporaryDirectory() as folder:
        return work(name, args.model, folder, args.device)


def run_all(
    action: str, names: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, Phases | ProcessDiedError]]:
    """Yield each method with its bytes or its error, in the order in which they finish.

    Args:
        action: planned or measured.
        names: Names of the methods.
        args: Options of the command line.
    """
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run_in_subprocess, action, name, args): name for name in names}
        for done in as_completed(jobs):
            try:
                yield jobs[done], done.result()
            except ProcessDiedError as failure:
                yield jobs[done], failure


def load_or_make_plans(args: argparse.Namespace) -> dict[str, Phases]:
    """Return the plans by method: read the file, and add the plans that are missing in it.

    Args:
        args: Options of the command line.
    """
    file = Path(args.plans) if args.plans else None
    known = json.loads(file.read_text()) if file and file.is_file() else {}
    missing = [name for name in args.methods if f"{args.model} {name}" not in known]
    for name, found in run_all("planned", missing, args):
        if isinstance(found, ProcessDiedError):
            print(f"{name:<18} no plan: {found}", flush=True)
            continue
        known[f"{args.model} {name}"] = found
        print(f"{name:<18} planned " + "  ".join(format_phases(found)), flush=True)
        if file:
            file.write_text(json.dumps(known, indent=1))
    return {name: known.get(f"{args.model} {name}", {}) for name in args.methods}


def format_phases(found: Phases) -> Iterator[str]:
    """Yield the name and the GiB of each phase.

    Args:
        found: Bytes by phase.
    """
    for phase in (phase for phase in PHASE_ORDER if phase in found):
        yield f"{phase} {found[phase] / GIB:.3f}"


def print_differences(plan: Phases, real: Phases, name: str) -> list[float]:
    """Print a line per phase and return the errors of the plan as fractions of the measured bytes.

    Args:
        plan: Estimated bytes by phase.
        real: Measured bytes by phase.
        name: Name of the method.
    """
    errors = []
    for phase in (phase for phase in PHASE_ORDER if phase in real or phase in plan):
        estimate, peak = plan.get(phase, 0), real.get(phase, 0)
        errors.append(estimate / peak - 1 if peak else 1.0)
        print(
            f"{name:<18} {phase:<8} {estimate / GIB:>9.4f} {peak / GIB:>9.4f} {errors[-1]:>+8.2%}",
            flush=True,
        )
    return errors


def library_versions(device: str) -> str:
    """Return the versions and the device of the measurement.

    Args:
        device: cpu or cuda.
    """
    import torch
    import transformers

    device_name = torch.cuda.get_device_name() if device != "cpu" else "a CPU"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {device_name}"


def main(argv: list[str]) -> int:
    """Plan the methods, measure them and compare both.

    Args:
        argv: Arguments of the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen-2.5-0.5b", help="toy, or a built-in architecture")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--methods", nargs="+", default=METHODS.split(), choices=METHODS.split())
    parser.add_argument("--plans", help="JSON file of plans; missing plans are added")
    parser.add_argument("--measured", action="store_true", help="run the fits and compare")
    parser.add_argument("--within", type=float, default=0.05, help="largest error, a fraction")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a process")
    parser.add_argument("--one", choices=("planned", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run_here(args.one, args.methods[0], args)))
        return 0
    plans = load_or_make_plans(args)
    if not args.measured:
        return int(not all(plans.values()))
    print(library_versions(args.device))
    print(f"{'method':<18} {'phase':<8} {'planned':>9} {'measured':>9}      off", flush=True)
    wrong = 0
    for name, found in run_all("measured", args.methods, args):
        if isinstance(found, ProcessDiedError):
            print(f"{name:<18} failed: {found}", flush=True)
            wrong += 1
        else:
            wrong += any(
                abs(off) > args.within for off in print_differences(plans[name], found, name)
            )
    print(f"{len(args.methods) - wrong} of {len(args.methods)} methods within {args.within:.0%}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

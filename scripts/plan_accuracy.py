"""What `lit-align plan` foretells, beside what an allocator counts in a real fit of two steps.

    python scripts/plan_accuracy.py --plans plans.json              # any machine: the plans alone
    python scripts/plan_accuracy.py --plans plans.json --measured   # a machine with a GPU: both
    python scripts/plan_accuracy.py --model toy --device cpu --measured

Each plan and each fit has a process of its own. Every line is printed as soon as it is known, in
GiB; a method that fails says why, and the others go on. Status 1 if a method has failed or a phase
is further from its plan than `--within`.
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

ORDER = ("load", "rollout", "score", "prepare", "update")
METHODS = "SFT SFT-checkpointing SFT-GaLore DPO RewardModel GRPO ReMax SPR PPO LoRA-PPO Hydra-PPO"
GIB = 2**30  # bytes
Phases = dict[str, int]  # bytes by phase


class DiedError(RuntimeError):
    """A process that has died, by its last line."""


def apart(verb: str, name: str, args: argparse.Namespace) -> Phases:
    """Bytes by phase, from a process that does nothing else.

    Args:
        verb: planned or measured.
        name: Of the method.
        args: Of the command line.
    """
    words = [sys.executable, __file__, "--one", verb, "--methods", name]
    words += ["--model", args.model, "--device", args.device]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=args.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise DiedError(f"not done after {args.seconds} seconds") from None
    if done.returncode:
        raise DiedError(next(iter(done.stderr.strip().splitlines()[-1:]), f"{done.returncode}"))
    found: Phases = json.loads(done.stdout.splitlines()[-1])
    return found


def here(verb: str, name: str, args: argparse.Namespace) -> Phases:
    """The same in this process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"}
    if verb == "planned":
        from bench.foretold import planned as work
    else:
        from bench.accuracy import measured as work
    with tempfile.TemporaryDirectory() as folder:
        return work(name, args.model, folder, args.device)


def all_of(
    verb: str, names: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, Phases | DiedError]]:
    """Each method with its bytes or why it has none, in the order in which they are known."""
    with ThreadPoolExecutor(args.jobs) as pool:
        asked = {pool.submit(apart, verb, name, args): name for name in names}
        for done in as_completed(asked):
            try:
                yield asked[done], done.result()
            except DiedError as failure:
                yield asked[done], failure


def known_plans(args: argparse.Namespace) -> dict[str, Phases]:
    """The plans of the file, and those that it lacks, which are added to it."""
    file = Path(args.plans) if args.plans else None
    known = json.loads(file.read_text()) if file and file.is_file() else {}
    lacking = [name for name in args.methods if f"{args.model} {name}" not in known]
    for name, found in all_of("planned", lacking, args):
        if isinstance(found, DiedError):
            print(f"{name:<18} no plan: {found}", flush=True)
            continue
        known[f"{args.model} {name}"] = found
        print(f"{name:<18} planned " + "  ".join(written(found)), flush=True)
        if file:
            file.write_text(json.dumps(known, indent=1))
    return {name: known.get(f"{args.model} {name}", {}) for name in args.methods}


def written(found: Phases) -> Iterator[str]:
    """Each phase and its GiB."""
    for phase in (phase for phase in ORDER if phase in found):
        yield f"{phase} {found[phase] / GIB:.3f}"


def compared(plan: Phases, real: Phases, name: str) -> list[float]:
    """Prints a line per phase; how far the plan is off, as shares of what was measured.

    Args:
        plan: Bytes by phase.
        real: The same.
        name: Of the method.
    """
    apart = []
    for phase in (phase for phase in ORDER if phase in real or phase in plan):
        foretold, found = plan.get(phase, 0), real.get(phase, 0)
        apart.append(foretold / found - 1 if found else 1.0)
        print(
            f"{name:<18} {phase:<8} {foretold / GIB:>9.4f} {found / GIB:>9.4f} {apart[-1]:>+8.2%}",
            flush=True,
        )
    return apart


def versions(device: str) -> str:
    """What the figures were measured with."""
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device != "cpu" else "a CPU"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {card}"


def main(words: list[str]) -> int:
    """Plans, measures, compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen-2.5-0.5b", help="toy, or a shape of the plan")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--methods", nargs="+", default=METHODS.split(), choices=METHODS.split())
    parser.add_argument("--plans", help="JSON file of plans, read and added to")
    parser.add_argument("--measured", action="store_true", help="fit, and compare")
    parser.add_argument("--within", type=float, default=0.05, help="share that a plan may be off")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=120, help="that a process may take")
    parser.add_argument("--one", choices=("planned", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.one:
        print(json.dumps(here(args.one, args.methods[0], args)))
        return 0
    plans = known_plans(args)
    if not args.measured:
        return int(not all(plans.values()))
    print(versions(args.device))
    print(f"{'method':<18} {'phase':<8} {'planned':>9} {'measured':>9}      off", flush=True)
    wrong = 0
    for name, found in all_of("measured", args.methods, args):
        if isinstance(found, DiedError):
            print(f"{name:<18} failed: {found}", flush=True)
            wrong += 1
        else:
            wrong += any(abs(off) > args.within for off in compared(plans[name], found, name))
    print(f"{len(args.methods) - wrong} of {len(args.methods)} methods within {args.within:.0%}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

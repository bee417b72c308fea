"""Compare the bytes of every algorithm by phase with the formulas of the papers, exactly.

    python scripts/bench_memory.py            # the table and the checks; status 1 if one is missed
    python scripts/bench_memory.py --quick    # a smaller network and head

A small Llama trains on two batches of each algorithm on a CPU. Trained weights are in fp32 and
frozen ones in bf16, as in training with `bf16-mixed`. On a GPU, frozen networks are offloaded in
the update. A CPU offloads nothing, so their bytes are subtracted from its peak.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"}

import torch
from bench.formulas import Size
from bench.phases import Row, algorithms, layouts, measured

from lit_align.data.text import load_tokenizer
from lit_align.functional.logprobs import chosen_logprobs
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.runs.allocations import CPUAllocations, storage_bytes

SMALL, MIDDLE = Size(256, 64, 176, 2), Size(256, 128, 344, 3)
METHODS = ("AdamW", "GaLore", "SLTrain")
PHASES = ("load", "rollout", "score", "prepare", "update")


def head_peak(tokens: int, vocabulary: int, hidden: int) -> tuple[int, int]:
    """Return the peak bytes of log-probs, forward and backward, and their minimum.

    Args:
        tokens: Number of tokens T.
        vocabulary: Vocabulary size V.
        hidden: Hidden size H.
    """
    counter = CPUAllocations()
    counter.start()
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    chosen = torch.randint(vocabulary, (tokens,))
    counter.begin()
    chosen_logprobs(states, weight, chosen)[0].sum().backward()
    peak = counter.end()
    counter.stop()
    return peak, 2 * storage_bytes([states, weight], torch.device("cpu")) + 4 * 1024 * vocabulary


def measure_rows(size: Size, response_tokens: int) -> list[Row]:
    """Return all rows of the table.

    Args:
        size: Size of every network.
        response_tokens: Tokens of a response.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        base = f"{folder}/base"
        PolicyWithRewardHead(config=size.config).save(Path(base))
        load_tokenizer("toy").save_pretrained(base)
        for method in METHODS:
            rows += [
                measured(case, folder, response_tokens) for case in algorithms(size, base, method)
            ]
        rows += [measured(case, folder, response_tokens) for case in layouts(size, base)]
    return rows


def failed_checks(rows: list[Row], head: tuple[int, int]) -> list[str]:
    """Return a sentence for each check that fails."""
    found = {(row.algorithm, row.method): row for row in rows}
    wrong = [
        f"{row.algorithm}, {row.method}: weights, gradients and state are {row.static} bytes, not "
        f"{row.expected.bytes}"
        for row in rows
        if row.static != row.expected.bytes
    ]
    for method in METHODS:
        spr, sft = found["SPR", method].update, found["SFT", method].update
        if spr > 1.02 * sft:
            wrong.append(f"SPR's update, {method}: {spr / sft:.3f} of SFT's, and 1.02 is allowed")
    remax, ppo = sum(found["ReMax", "AdamW"].static), sum(found["PPO", "AdamW"].static)
    if remax > 0.56 * ppo:
        wrong.append(f"ReMax: {remax / ppo:.3f} of PPO, and 0.56 is allowed")
    peak, minimum = head
    if peak >= 1.3 * minimum:
        wrong.append(f"log-probs: {peak / minimum:.2f} of the minimum, 1.3 is allowed")
    return wrong


def report(rows: list[Row], head: tuple[int, int]) -> None:
    """Print the table and the ratios that are checked."""
    print(f"{'algorithm':<12} {'by':<8}" + "".join(f"{phase:>12}" for phase in PHASES), end="")
    print(f"{'offloaded':>11}{'static':>11}{'by formula':>11}  formula")
    for row in rows:
        peaks = [f"{row.peaks[p].peak:,}" if p in row.peaks else "-" for p in PHASES]
        print(f"{row.algorithm:<12} {row.method:<8}" + "".join(f"{p:>12}" for p in peaks), end="")
        static, formula = sum(row.static), sum(row.expected.bytes)
        print(f"{row.offloaded_bytes:>11,}{static:>11,}{formula:>11,}  {row.expected.paper}")
    found = {(row.algorithm, row.method): row for row in rows}
    for method in METHODS:
        ratio = found["SPR", method].update / found["SFT", method].update
        print(f"update of SPR over SFT, {method}: {ratio:.4f}")
    ratio = sum(found["ReMax", "AdamW"].static) / sum(found["PPO", "AdamW"].static)
    print(f"static bytes of ReMax over PPO: {ratio:.4f}")
    print(f"log-probs: {head[0]:,} bytes at most, {head[0] / head[1]:.3f} of the minimum")


def main(argv: list[str]) -> int:
    """Measure and print. Return 1 if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller network and head")
    quick = parser.parse_args(argv).quick
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = measure_rows(SMALL, 12) if quick else measure_rows(MIDDLE, 32)
    head = head_peak(2048, 20_000, 64) if quick else head_peak(8192, 152_000, 64)
    report(rows, head)
    wrong = failed_checks(rows, head)
    print("\n".join(wrong) or "all checks passed")
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))

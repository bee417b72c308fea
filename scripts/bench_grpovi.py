"""Time of reward variance increase (GRPOVI) by group size: medians, sizes interleaved.

    python scripts/bench_grpovi.py

Prints milliseconds per call, the cost per n log2 n relative to the smallest group, and the slope
of log cost over log n. Then it compares one batch of 512 prompts with 512 single calls.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_align.functional.variance import increase_variance

SIZES = [3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
ROUNDS = 15


def group(prompts: int, samples: int, ties: bool) -> tuple[Tensor, Tensor]:
    """Return random scores [B, G] and probabilities [B, G]. With ties, scores are 0 or 1."""
    generator = torch.Generator().manual_seed(samples)
    scores = torch.rand(prompts, samples, generator=generator, dtype=torch.float64)
    weights = torch.randn(prompts, samples, generator=generator, dtype=torch.float64)
    return (scores < 0.5).double() if ties else scores, weights.softmax(-1)


def medians(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median milliseconds of each call. Calls alternate, so load affects all equally."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 1):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn:  # the first round warms up
                spent.append(time.perf_counter() - start)
    return [1000 * statistics.median(spent) for spent in seconds]


def growth(ties: bool) -> None:
    """Print one table over the sizes."""
    groups = [group(1, size, ties) for size in SIZES]
    costs = medians([lambda pair=pair: increase_variance(*pair, 0.0, 1.0) for pair in groups])
    print(f"{'rewards of 0 and 1' if ties else 'rewards without ties'}, one group")
    print(f"{'rewards':>10}  {'ms':>9}  {'ms / n log n, relative':>22}")
    first = costs[0] / (SIZES[0] * math.log2(SIZES[0]))
    for size, cost in zip(SIZES, costs, strict=True):
        print(f"{size:>10,}  {cost:>9.3f}  {cost / (size * math.log2(size)) / first:>22.2f}")
    logs = [math.log(size) for size in SIZES]
    slope = statistics.linear_regression(logs, [math.log(cost) for cost in costs]).slope
    ideal = statistics.linear_regression(logs, [math.log(n * math.log2(n)) for n in SIZES]).slope
    print(f"slope: {slope:.2f}; of n log n: {ideal:.2f}\n")


def batch() -> None:
    """Print the time of 512 prompts at once and one by one."""
    scores, probs = group(512, 64, ties=False)
    rows = list(zip(scores.split(1), probs.split(1), strict=True))
    batched, single = medians(
        [
            lambda: increase_variance(scores, probs, 0.0, 1.0),
            lambda: [increase_variance(*row, 0.0, 1.0) for row in rows],
        ]
    )
    print(f"a batch [512, 64]: {batched:.2f} ms at once, {single:.1f} ms prompt by prompt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    growth(ties=False)
    growth(ties=True)
    batch()

"""How seconds and bytes of a GRPO step grow, one axis at a time."""

from __future__ import annotations

import csv
import math
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import data, lit_align_side
from bench.case import MODELS, Case, Shape
from bench.interleave import interleave_steps
from bench.memory import peak, run_in_fork

AXES = {
    "prompts": [2, 4, 8, 16],
    "samples of a prompt": [2, 4, 8, 16],
    "tokens of a response": [32, 64, 128, 256],
    "parameters": [64, 128, 256, 512],  # by the hidden size
}


class Point(NamedTuple):
    """One measurement.

    Args:
        axis: One of AXES.
        size: Where on it.
        seconds: Of a step, on the processor.
        bytes: At most, above what the process began with.
    """

    axis: str
    size: int
    seconds: float
    bytes: int


def case(axis: str, size: int) -> Case:
    """4 prompts, 8 samples, 32 tokens, 1 M parameters, but for one."""
    prompts = size if axis == "prompts" else 4
    samples = size if axis == "samples of a prompt" else 8
    answer = size if axis == "tokens of a response" else 32
    model = "1M"
    if axis == "parameters":
        model = f"hidden {size}"
        MODELS[model] = {
            **MODELS["1M"],
            "hidden_size": size,
            "intermediate_size": 3 * size,
        }
    return Case("grpo", model, Shape("full", prompts * samples, samples, 32, answer, 0, 8))


def num_parameters(case: Case) -> int:
    """Weights of a Llama without biases and with two embeddings."""
    size = MODELS[case.model]
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    block = 4 * hidden**2 + 3 * hidden * size["intermediate_size"] + 2 * hidden
    return layers * block + 2 * size["vocab_size"] * hidden + hidden


def seconds_per_step(case: Case, folder: Path) -> float:
    """Seconds of a step."""
    (steps,) = interleave_steps([partial(lit_align_side.run, case, folder)], 3)
    return median(step.work for step in steps)


def peak_bytes(case: Case, folder: Path) -> int:
    """Peak bytes of two steps."""
    return peak(lambda: lit_align_side.run(case, folder, 2, lambda: None), case.device)


def measure_points() -> list[Point]:
    """All points."""
    points = []
    for axis, sizes in AXES.items():
        for size in sizes:
            what = case(axis, size)
            at = num_parameters(what) if axis == "parameters" else size
            with tempfile.TemporaryDirectory() as path:
                run_in_fork(data.write_files, what, Path(path), 5)
                costs = (
                    run_in_fork(work, what, Path(path)) for work in (seconds_per_step, peak_bytes)
                )
                points.append(Point(axis, at, *costs))
            print(*points[-1], sep=",", flush=True)
    return points


def doubling_slope(points: list[Point], of: str) -> float:
    """How many times seconds or bytes double when the size does, between the two largest sizes."""
    first, last = points[-2:]
    return math.log(getattr(last, of) / getattr(first, of)) / math.log(last.size / first.size)


def save_picture(points: list[Point], picture: Path) -> None:
    """Write the picture, and its numbers as a CSV file of the same name."""
    with picture.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Point._fields)
        rows.writerows(points)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(AXES), figsize=(14, 6), layout="constrained")
    for column, axis in enumerate(AXES):
        axis_points = [point for point in points if point.axis == axis]
        for panel, of in zip(panels[:, column], ("seconds", "bytes"), strict=True):
            sizes = [point.size for point in axis_points]
            panel.loglog(sizes, [getattr(p, of) for p in axis_points], "o-")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.set_title(f"slope {doubling_slope(axis_points, of):.2f}")
            panel.set(xlabel=axis, ylabel=of)
            panel.grid(True, which="both", alpha=0.3)
    figure.savefig(picture, dpi=90)

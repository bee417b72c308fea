"""Write runs as one HTML file: curves, frontier, memory, completions, configs.

The file needs no network.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

from lit_align.errors import UserError
from lit_align.report.completions import SampledResponses
from lit_align.report.downsample import DownsampledCurve, bucket_edges, downsample
from lit_align.runs.run_folder import RunFolder
from lit_align.version import __version__

ReportData = dict[str, object]

PANELS = [  # title, unit, metrics; the first metric that was logged is plotted
    ("Reward", "mean of a rollout's responses", ("reward",)),
    ("Reward, held-out prompts", "greedy responses", ("val/reward",)),
    ("KL to the reference", "nats per response", ("kl/per_response_k1",)),
    ("Entropy", "nats per token", ("entropy",)),
    ("Length", "tokens per response", ("completions/mean_length",)),
    (
        "Clip fraction",
        "fraction of tokens",
        ("policy/clipfrac_avg", "clip_ratio/region_mean"),
    ),
    ("Responses cut off", "fraction without a stop token", ("completions/clipped_ratio",)),
    ("Loss", "", ("loss",)),
    ("Loss, held-out rows", "", ("val/loss",)),
    ("Accuracy", "", ("rewards/accuracies", "val/accuracy", "accuracy", "mean_token_accuracy")),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Speed", "tokens per second", ("tokens_per_second",)),
]
PER_RUN_SETTINGS = ("seed_everything", "data.seed", "trainer.default_root_dir", "ckpt_path")
MAX_POINTS = 600  # of a curve
MAX_VALUES = 400_000  # of all curves together, 4 per point
MAX_COMPLETION_BYTES = 4_000_000  # of all completions together


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page.

    Args:
        runs: Run folders.
        out: HTML file to write. Its folder is created.

    Returns:
        The path of the file.
    """
    if not runs:
        raise UserError("There are no runs. Name at least one run folder.")
    page = render_html(report_data([RunFolder(run) for run in runs]))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page.encode("utf-8", "replace"))  # a model may write half a surrogate pair
    return out


def report_data(runs: list[RunFolder]) -> ReportData:
    """Return all data of the page, ready for JSON.

    Args:
        runs: Run folders.
    """
    names, arms = distinct_names(runs), group_by_config(runs)
    completions = SampledResponses(MAX_COMPLETION_BYTES, len(runs))
    for index, run in enumerate(runs):
        completions.add(run, index)
    curves = downsampled_curves(runs, [*arms.values()])
    logged = {name for each in curves for name in each}
    panels = [(title, unit, [m for m in names if m in logged][:1]) for title, unit, names in PANELS]
    plotted = [(title, unit, found[0]) for title, unit, found in panels if found]
    rest = sorted(logged - {metric for _, _, metric in plotted})
    return {
        "version": __version__,
        "axis": " / ".join(dict.fromkeys(run.axis for run in runs)),
        "runs": [run_facts(run, name) for run, name in zip(runs, names, strict=True)],
        "curves": curves,
        "arms": [{"name": arm_name(names, arm), "runs": arm} for arm in arms.values()],
        "panels": [{"title": t, "unit": u, "metric": m} for t, u, m in plotted],
        "rest": [{"title": metric, "unit": "", "metric": metric} for metric in rest],
        "config": config_differences(runs),
        "prompts": list(completions.prompts),
        "answers": completions.rows,
        "notes": [*non_finite_notes(runs), *completions.notes],
    }


def run_facts(run: RunFolder, name: str) -> ReportData:
    """Return the facts about a run alone.

    Args:
        run: Run folder.
        name: Name of the run on the page.
    """
    return {
        "name": name,
        "path": str(run.path),
        "algorithm": run.config.get("model", "").rpartition(".")[2],
        "seed": run.config.get("seed_everything", ""),
        "memory": run.memory,
        "seconds": run.seconds,
        "last": max((x for curve in run.curves.values() for x, _ in curve), default=0),
    }


def non_finite_notes(runs: list[RunFolder]) -> list[str]:
    """Return a note for each run with values that are not finite and so not plotted."""
    return [
        f"{run.path.name}: {run.num_non_finite:,} logged values are not finite and are not plotted."
        for run in runs
        if run.num_non_finite
    ]


def distinct_names(runs: list[RunFolder]) -> list[str]:
    """Return the last parts of the runs' paths, as many as make the names distinct."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(paths, 1)]


def group_by_config(runs: list[RunFolder]) -> dict[str, list[int]]:
    """Return groups of runs whose configs differ in the seed alone, by their common config.

    Args:
        runs: Run folders. A run without a config is a group of its own.
    """
    arms: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        given = {key: value for key, value in run.config.items() if value != "null"}
        shared = {key: value for key, value in given.items() if key not in PER_RUN_SETTINGS}
        key = json.dumps(shared, sort_keys=True) if shared else f"run {index}"
        arms.setdefault(key, []).append(index)
    return arms


def arm_name(names: list[str], arm: list[int]) -> str:
    """Return the name of a group of runs: the common start of their names.

    Args:
        names: Names of all runs.
        arm: Indices of the group's runs.

    Example:
        >>> arm_name(["remax_0", "remax_1", "ppo"], [0, 1])
        'remax, 2 seeds'
    """
    mine = [names[index] for index in arm]
    if len(mine) == 1:
        return mine[0]
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(min(mine), max(mine), strict=False))
    shared = "".join(letter for letter, _ in pairs).rstrip("_-./ 0123456789")
    return f"{shared or mine[0]}, {len(mine)} seeds"


def downsampled_curves(
    runs: list[RunFolder], arms: list[list[int]]
) -> list[dict[str, DownsampledCurve]]:
    """Return the downsampled curves of each run, by metric.

    Runs of one group have their points at the same x, so that the page can average them.

    Args:
        runs: Run folders.
        arms: Indices of the runs of each group.
    """
    total = sum(len(run.curves) for run in runs)
    max_points = max(20, min(MAX_POINTS, MAX_VALUES // (4 * max(total, 1))))
    found: list[dict[str, DownsampledCurve]] = [{} for _ in runs]
    for arm in arms:
        for name in sorted({name for index in arm for name in runs[index].curves}):
            logging_runs = [index for index in arm if name in runs[index].curves]
            bounds = bucket_edges([runs[index].curves[name] for index in logging_runs], max_points)
            for index in logging_runs:
                found[index][name] = downsample(runs[index].curves[name], *bounds)
    return found


def config_differences(runs: list[RunFolder]) -> list[ReportData]:
    """Return every setting with its value in each run, and True if the values differ."""
    names = sorted({name for run in runs for name in run.config})
    found: list[ReportData] = []
    for name in names:
        values = [run.config.get(name, "") for run in runs]
        # a setting that an older version did not have counts as null
        distinct_values = {value or "null" for value in values}
        found.append({"name": name, "values": values, "differs": len(distinct_values) > 1})
    return found


def render_html(report: ReportData) -> str:
    """Return the page. Texts of models and configs are embedded as JSON and never as HTML.

    A content security policy allows only the script with the given hash and no network access.

    Args:
        report: Data of the page.
    """
    page, style, script = (
        files("lit_align.report.page").joinpath(f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # `<` is escaped in the data: a text with </script> must not end the script element
    data = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {"HASH": digest, "STYLE": style, "SCRIPT": script, "DATA": data.replace("<", "\\u003c")}
    # split once before filling, so that {{...}} in the data is not replaced
    before, *pieces = page.split("{{")
    for piece in pieces:
        name, _, after = piece.partition("}}")
        before += parts[name] + after
    return before

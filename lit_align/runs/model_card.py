"""The README.md beside exported weights: what they are, and how they came to be."""

import re
import shutil
from pathlib import Path

import yaml

from lit_align.models.backbone import Backbone
from lit_align.runs.environment_file import read_starts
from lit_align.runs.run_folder import Points, RunFolder
from lit_align.version import __version__

CARD_METRICS = {  # what is told of a run, where it was logged
    "reward": "reward",
    "val/reward": "reward on held-out prompts, greedy answers",
    "kl/per_response_k1": "KL to the reference, nats per response",
    "val/kl/per_response_k1": "KL on held-out prompts, nats per response",
    "completions/mean_length": "length, tokens per response",
    "entropy": "entropy, nats per token",
    "loss": "loss",
    "val/loss": "loss on held-out rows",
    "rewards/accuracies": "share of pairs told apart",
    "val/accuracy": "accuracy on held-out rows",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MODEL_CLASSES = {  # pipeline tag, transformers' class, peft's class; by what the head reads
    "language": ("text-generation", "AutoModelForCausalLM", "AutoPeftModelForCausalLM"),
    "score": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoPeftModelForSequenceClassification",
    ),
}


def write_card(
    folder: Path, run: Path, network: Backbone, is_full_model: bool | None = None
) -> Path:
    """Writes README.md beside a network's weights, and puts the run's curves there.

    Args:
        folder: Where the weights are.
        run: The run folder, with whatever of config.yaml, metrics.csv, curves.png and
            environment.json it has.
        network: Whose weights they are.
        is_full_model: Whether they are a whole model's and no adapter's; None: as it is saved.

    Returns:
        The file.
    """
    if (run / "curves.png").is_file():
        shutil.copyfile(run / "curves.png", folder / "curves.png")
    file = folder / "README.md"
    saves_full_model = network.saves_full_model if is_full_model is None else is_full_model
    file.write_text(render_card(folder, run, network, saves_full_model), encoding="utf-8")
    return file


def render_card(folder: Path, run: Path, network: Backbone, is_full_model: bool) -> str:
    """The text; arguments as `write_card` has them."""
    run_folder = RunFolder(run) if (run / "metrics.csv").is_file() else None
    settings = run_folder.config if run_folder else {}
    algorithm = settings.get("model", "").rpartition(".")[2]
    by = f" by {algorithm}" if algorithm else ""
    parts = [
        front_matter(network, is_full_model, algorithm, settings.get("data.path", "")),
        f"# {run.resolve().name}",
        f"A {MODEL_CLASSES[network.head_name][0]} model, trained{by} with lit_align {__version__}.",
        facts_table(settings, network, is_full_model),
        metrics_table(run_folder.curves, run_folder.axis) if run_folder else "",
        "![curves](curves.png)" if (folder / "curves.png").is_file() else "",
        usage_section(network, is_full_model),
        reproduction_section(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(network: Backbone, is_full_model: bool, algorithm: str, data: str) -> str:
    """What the hub reads; names that are no hub ids are left out of it.

    Args:
        network: Whose card it is.
        is_full_model: Whether it is no adapter.
        algorithm: Its class, empty if unknown.
        data: Path of the rows.
    """
    settings = {
        "library_name": "transformers" if is_full_model else "peft",
        "pipeline_tag": MODEL_CLASSES[network.head_name][0],
        "tags": ["lit_align", *([algorithm.lower()] if algorithm else [])],
        **({"base_model": network.name} if is_hub_id(network.name) else {}),
        **({"datasets": [data]} if is_hub_id(data) else {}),
    }
    return f"---\n{yaml.safe_dump(settings, sort_keys=False)}---"


def is_hub_id(path: str) -> bool:
    """Whether it is written like one, and is no folder here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def facts_table(settings: dict[str, str], network: Backbone, is_full_model: bool) -> str:
    """A table of what it was made of.

    Args:
        settings: Of the run, by dotted name.
        network: Whose card it is.
        is_full_model: Whether it is no adapter.
    """
    rewards = [
        value.rpartition(".")[2] if name == "reward.functions" else value
        for name, value in settings.items()
        if name.startswith("reward.functions") and value != "null"
    ]
    rows = {
        "base model": network.name,
        "weights": "whole" if is_full_model else "a low-rank adapter",
        "data": settings.get("data.path", ""),
        "reward": ", ".join(rewards),
        "seed": settings.get("seed_everything", ""),
    }
    lines = [f"| {name} | {escape_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|-|-|", *lines])


def metrics_table(curves: dict[str, Points], axis: str) -> str:
    """Means over the first and the last tenth of what was logged."""
    lines = [
        f"| {text} | {tenth_mean(curves[name], False):.4g} | {tenth_mean(curves[name], True):.4g} |"
        for name, text in CARD_METRICS.items()
        if name in curves
    ]
    if not lines:
        return ""
    last = max(x for points in curves.values() for x, _ in points)
    head = [f"Over {last:g} {axis}:", "", "| figure | first tenth | last tenth |", "|-|-|-|"]
    return "\n".join([*head, *lines])


def tenth_mean(points: Points, last: bool) -> float:
    """The mean over the first or the last tenth, at least one value."""
    number = max(1, len(points) // 10)
    values = [y for _, y in (points[-number:] if last else points[:number])]
    return sum(values) / len(values)


def escape_cell(text: str) -> str:
    """A text that stays within its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def usage_section(network: Backbone, is_full_model: bool) -> str:
    """How it is loaded."""
    _, model_class, adapter_class = MODEL_CLASSES[network.head_name]
    package, kind = ("transformers", model_class) if is_full_model else ("peft", adapter_class)
    lines = [
        f"from {package} import {kind}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]
    return "\n".join(["```python", *lines, "```"])


def reproduction_section(run: Path) -> str:
    """What makes it again: the commands as they were given, and the settings that they came to."""
    given = dict.fromkeys(
        f"    {entry['command']}" for entry in read_starts(run) if entry["command"]
    )
    made_by = ["Made by", "", *given] if given else []
    file = run / "config.yaml"
    if not file.is_file():
        return "\n".join(made_by)
    text = file.read_text(encoding="utf-8").strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [
        "The same with all settings, which are below and in the run's `config.yaml`:",
        "",
        "    lit-align fit --config config.yaml",
        "",
        "<details><summary>config.yaml</summary>",
        "",
        f"{fence}yaml",
        text,
        fence,
        "",
        "</details>",
    ]
    return "\n".join([*made_by, *([""] if made_by else []), *lines])

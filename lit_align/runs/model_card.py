"""The README.md beside exported weights: what they are, and how they came to be."""

import re
import shutil
from pathlib import Path

import yaml

from lit_align.models.backbone import Backbone
from lit_align.runs.environment_file import starts
from lit_align.runs.run_folder import Points, RunFolder
from lit_align.version import __version__

FIGURES = {  # what is told of a run, where it was logged
    "reward": "reward",
    "val/reward": "reward on held-out prompts, greedy answers",
    "objective/kl": "KL to the reference, nats per response",
    "val/objective/kl": "KL on held-out prompts, nats per response",
    "completions/mean_length": "length, tokens per response",
    "entropy": "entropy, nats per token",
    "loss": "loss",
    "val/loss": "loss on held-out rows",
    "rewards/accuracies": "share of pairs told apart",
    "val/accuracy": "accuracy on held-out rows",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
KINDS = {  # pipeline tag, transformers' class, peft's class; by what the head reads
    "language": ("text-generation", "AutoModelForCausalLM", "AutoPeftModelForCausalLM"),
    "score": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoPeftModelForSequenceClassification",
    ),
}


def write_card(place: Path, run: Path, network: Backbone, whole: bool | None = None) -> Path:
    """Writes README.md beside a network's weights, and puts the run's curves there.

    Args:
        place: Where the weights are.
        run: The run folder, with whatever of config.yaml, metrics.csv, curves.png and
            environment.json it has.
        network: Whose weights they are.
        whole: Whether they are a whole model's and no adapter's; None: as the network saves them.

    Returns:
        The file.
    """
    if (run / "curves.png").is_file():
        shutil.copyfile(run / "curves.png", place / "curves.png")
    file = place / "README.md"
    saved_whole = network.saved_whole if whole is None else whole
    file.write_text(card(place, run, network, saved_whole), encoding="utf-8")
    return file


def card(place: Path, run: Path, network: Backbone, whole: bool) -> str:
    """The text; arguments as `write_card` has them."""
    known = RunFolder(run) if (run / "metrics.csv").is_file() else None
    settings = known.config if known else {}
    algorithm = settings.get("model", "").rpartition(".")[2]
    by = f" by {algorithm}" if algorithm else ""
    parts = [
        front_matter(network, whole, algorithm, settings.get("data.path", "")),
        f"# {run.resolve().name}",
        f"A {KINDS[network.reads][0]} model, trained{by} with lit_align {__version__}.",
        facts(settings, network, whole),
        figures(known.curves, known.axis) if known else "",
        "![curves](curves.png)" if (place / "curves.png").is_file() else "",
        usage(network, whole),
        command(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(network: Backbone, whole: bool, algorithm: str, data: str) -> str:
    """What the hub reads; names that are no hub ids are left out of it.

    Args:
        network: Whose card it is.
        whole: Whether it is no adapter.
        algorithm: Its class, empty if unknown.
        data: Path of the rows.
    """
    settings = {
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": KINDS[network.reads][0],
        "tags": ["lit_align", *([algorithm.lower()] if algorithm else [])],
        **({"base_model": network.name} if is_hub_id(network.name) else {}),
        **({"datasets": [data]} if is_hub_id(data) else {}),
    }
    return f"---\n{yaml.safe_dump(settings, sort_keys=False)}---"


def is_hub_id(path: str) -> bool:
    """Whether it is written like one, and is no folder here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def facts(settings: dict[str, str], network: Backbone, whole: bool) -> str:
    """A table of what it was made of.

    Args:
        settings: Of the run, by dotted name.
        network: Whose card it is.
        whole: Whether it is no adapter.
    """
    rewards = [
        value.rpartition(".")[2] if name == "reward.sources" else value
        for name, value in settings.items()
        if name.startswith("reward.sources") and value != "null"
    ]
    rows = {
        "base model": network.name,
        "weights": "whole" if whole else "a low-rank adapter",
        "data": settings.get("data.path", ""),
        "reward": ", ".join(rewards),
        "seed": settings.get("seed_everything", ""),
    }
    lines = [f"| {name} | {cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|-|-|", *lines])


def figures(curves: dict[str, Points], axis: str) -> str:
    """Means over the first and the last tenth of what was logged."""
    lines = [
        f"| {text} | {tenth(curves[name], False):.4g} | {tenth(curves[name], True):.4g} |"
        for name, text in FIGURES.items()
        if name in curves
    ]
    if not lines:
        return ""
    last = max(x for points in curves.values() for x, _ in points)
    head = [f"Over {last:g} {axis}:", "", "| figure | first tenth | last tenth |", "|-|-|-|"]
    return "\n".join([*head, *lines])


def tenth(points: Points, last: bool) -> float:
    """The mean over the first or the last tenth, at least one value."""
    number = max(1, len(points) // 10)
    values = [y for _, y in (points[-number:] if last else points[:number])]
    return sum(values) / len(values)


def cell(text: str) -> str:
    """A text that stays within its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def usage(network: Backbone, whole: bool) -> str:
    """How it is loaded."""
    _, of_models, of_adapters = KINDS[network.reads]
    package, kind = ("transformers", of_models) if whole else ("peft", of_adapters)
    lines = [
        f"from {package} import {kind}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]
    return "\n".join(["```python", *lines, "```"])


def command(run: Path) -> str:
    """What makes it again: the commands as they were given, and the settings that they came to."""
    given = dict.fromkeys(f"    {entry['command']}" for entry in starts(run) if entry["command"])
    said = ["Made by", "", *given] if given else []
    file = run / "config.yaml"
    if not file.is_file():
        return "\n".join(said)
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
    return "\n".join([*said, *([""] if said else []), *lines])

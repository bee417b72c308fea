"""The README.md beside exported weights: what they are, and how they came to be."""

import re
import shutil
from pathlib import Path

import yaml

from lit_align.callbacks.run_folder import Points, RunFolder
from lit_align.models.backbone import Backbone
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


def write_card(place: Path, run: Path, network: Backbone) -> Path:
    """Writes README.md beside a network's weights, and puts the run's curves there.

    Args:
        place: Where the weights are.
        run: The run folder, with whatever of config.yaml, metrics.csv and curves.png it has.
        network: Whose weights they are.

    Returns:
        The file.
    """
    if (run / "curves.png").is_file():
        shutil.copyfile(run / "curves.png", place / "curves.png")
    file = place / "README.md"
    file.write_text(card(place, run, network), encoding="utf-8")
    return file


def card(place: Path, run: Path, network: Backbone) -> str:
    """The text; arguments as `write_card` has them."""
    known = RunFolder(run) if (run / "metrics.csv").is_file() else None
    settings = known.config if known else {}
    algorithm = settings.get("model", "").rpartition(".")[2]
    by = f" by {algorithm}" if algorithm else ""
    parts = [
        front_matter(network, algorithm, settings.get("data.path", "")),
        f"# {run.resolve().name}",
        f"A {KINDS[network.reads][0]} model, trained{by} with lit_align {__version__}.",
        facts(settings, network),
        figures(known.curves, known.axis) if known else "",
        "![curves](curves.png)" if (place / "curves.png").is_file() else "",
        usage(network),
        command(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(network: Backbone, algorithm: str, data: str) -> str:
    """What the hub reads; names that are no hub ids are left out of it.

    Args:
        network: Whose card it is.
        algorithm: Its class, empty if unknown.
        data: Path of the rows.
    """
    settings = {
        "library_name": "transformers" if network.saved_whole else "peft",
        "pipeline_tag": KINDS[network.reads][0],
        "tags": ["lit_align", *([algorithm.lower()] if algorithm else [])],
        **({"base_model": network.name} if is_hub_id(network.name) else {}),
        **({"datasets": [data]} if is_hub_id(data) else {}),
    }
    return f"---\n{yaml.safe_dump(settings, sort_keys=False)}---"


def is_hub_id(path: str) -> bool:
    """Whether it is written like one, and is no folder here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def facts(settings: dict[str, str], network: Backbone) -> str:
    """A table of what it was made of.

    Args:
        settings: Of the run, by dotted name.
        network: Whose card it is.
    """
    rewards = [
        value.rpartition(".")[2] if name == "reward.sources" else value
        for name, value in settings.items()
        if name.startswith("reward.sources") and value != "null"
    ]
    rows = {
        "base model": network.name,
        "weights": "whole" if network.saved_whole else "a low-rank adapter",
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


def usage(network: Backbone) -> str:
    """How it is loaded."""
    _, whole, adapter = KINDS[network.reads]
    package, kind = ("transformers", whole) if network.saved_whole else ("peft", adapter)
    lines = [
        f"from {package} import {kind}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]
    return "\n".join(["```python", *lines, "```"])


def command(run: Path) -> str:
    """What makes it again: the resolved settings and the command that reads them."""
    file = run / "config.yaml"
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8").strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(
        [
            "Made by, with all settings below in `config.yaml`:",
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
    )

"""Model card: the README.md of exported weights, with base, data, metrics and commands."""

import re
import shutil
from pathlib import Path

import yaml

from lit_align.models.backbone import Backbone
from lit_align.runs.environment_file import read_starts
from lit_align.runs.run_folder import Points, RunFolder
from lit_align.version import __version__

CARD_METRICS = {  # description of each metric in the card, by log key
    "reward": "reward",
    "val/reward": "reward on held-out prompts, greedy responses",
    "kl/per_response_k1": "KL to the reference, nats per response",
    "val/kl/per_response_k1": "KL on held-out prompts, nats per response",
    "completions/mean_length": "length, tokens per response",
    "entropy": "entropy, nats per token",
    "loss": "loss",
    "val/loss": "loss on held-out rows",
    "rewards/accuracies": "fraction of pairs with the higher reward for the chosen response",
    "val/accuracy": "accuracy on held-out rows",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MODEL_CLASSES = {  # pipeline tag, class of transformers and class of peft, by head
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
    """Write README.md to a folder of exported weights, and copy the run's curves there.

    Args:
        folder: Folder of the weights.
        run: Run folder. config.yaml, metrics.csv, curves.png and environment.json are used if
            they exist.
        network: Network of the weights.
        is_full_model: True for a full model, False for an adapter. Default: as the network saves.

    Returns:
        The path of README.md.
    """
    if (run / "curves.png").is_file():
        shutil.copyfile(run / "curves.png", folder / "curves.png")
    file = folder / "README.md"
    saves_full_model = network.saves_full_model if is_full_model is None else is_full_model
    file.write_text(render_card(folder, run, network, saves_full_model), encoding="utf-8")
    return file


def render_card(folder: Path, run: Path, network: Backbone, is_full_model: bool) -> str:
    """Return the text of the card. The arguments are those of `write_card`."""
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
    """Return the YAML header for the hub. Local paths are left out.

    Args:
        network: Network of the card.
        is_full_model: True for a full model, False for an adapter.
        algorithm: Class name of the algorithm. Empty if unknown.
        data: Path of the training data. Empty if unknown.
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
    """Return True if a path has the form of a hub id and is not a local folder.

    Example:
        >>> is_hub_id("someone/model"), is_hub_id("./model")
        (True, False)
    """
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def facts_table(settings: dict[str, str], network: Backbone, is_full_model: bool) -> str:
    """Return a table of base model, kind of weights, data, reward and seed.

    Args:
        settings: Settings of the run by dotted name.
        network: Network of the card.
        is_full_model: True for a full model, False for an adapter.
    """
    rewards = [
        value.rpartition(".")[2] if name == "reward.functions" else value
        for name, value in settings.items()
        if name.startswith("reward.functions") and value != "null"
    ]
    rows = {
        "base model": network.name,
        "weights": "full model" if is_full_model else "low-rank adapter",
        "data": settings.get("data.path", ""),
        "reward": ", ".join(rewards),
        "seed": settings.get("seed_everything", ""),
    }
    lines = [f"| {name} | {escape_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|-|-|", *lines])


def metrics_table(curves: dict[str, Points], axis: str) -> str:
    """Return a table of each metric's mean over the first and the last tenth of the run.

    Example:
        >>> print(metrics_table({"loss": [(1.0, 3.0), (2.0, 2.0)]}, "rollouts"))
        Over 2 rollouts:
        <BLANKLINE>
        | metric | first tenth | last tenth |
        |-|-|-|
        | loss | 3 | 2 |
    """
    lines = [
        f"| {text} | {tenth_mean(curves[name], False):.4g} | {tenth_mean(curves[name], True):.4g} |"
        for name, text in CARD_METRICS.items()
        if name in curves
    ]
    if not lines:
        return ""
    last = max(x for points in curves.values() for x, _ in points)
    head = [f"Over {last:g} {axis}:", "", "| metric | first tenth | last tenth |", "|-|-|-|"]
    return "\n".join([*head, *lines])


def tenth_mean(points: Points, last: bool) -> float:
    """Return the mean over the first or the last tenth of the points, at least one point.

    Example:
        >>> tenth_mean([(float(x), float(x)) for x in range(20)], last=True)
        18.5
    """
    number = max(1, len(points) // 10)
    values = [y for _, y in (points[-number:] if last else points[:number])]
    return sum(values) / len(values)


def escape_cell(text: str) -> str:
    r"""Return a text without line breaks and Markdown that would end its table cell.

    Example:
        >>> escape_cell("a|b")
        'a\\|b'
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def usage_section(network: Backbone, is_full_model: bool) -> str:
    """Return the Python code that loads the weights."""
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
    """Return the commands that were given and the resolved settings of the run."""
    given = dict.fromkeys(
        f"    {entry['command']}" for entry in read_starts(run) if entry["command"]
    )
    made_by = ["Trained with", "", *given] if given else []
    file = run / "config.yaml"
    if not file.is_file():
        return "\n".join(made_by)
    text = file.read_text(encoding="utf-8").strip()
    # longer than any run of backticks in the text, which would end the code block
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [
        "The same with all settings, from the `config.yaml` below:",
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

"""Several models on the same prompts: reward, KL, win rate, diversity, exact match."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from lit_align.evaluation.statistics import (
    Answers,
    Figures,
    at_equal_length,
    bootstrap,
    distinct,
    mean,
    numbers,
    pass_at,
    wins,
)
from lit_align.evaluation.tables import comparison_table
from lit_align.runs.run_folder import conversation_text

Judge = Callable[[Answers, Answers], list[float]]


def prompts_of(rows: Answers) -> list[str]:
    """Return the prompt of each row as text."""
    return [conversation_text(row["prompt"]) for row in rows]


def compared(
    answers: dict[str, Answers], samples: int, judge: Judge | None = None
) -> dict[str, Figures]:
    """The figures of each model; the first is what the others are compared with.

    Args:
        answers: By model, to the same prompts in the same order, a prompt's side by side.
        samples: Answers per prompt.
        judge: Says of each pair of answers whether the first one wins, beside their rewards.
    """
    first = next(iter(answers.values()))
    if not first:
        raise ValueError("there are no answers to compare: the evaluation rows are empty.")
    found = {}
    for name, rows in answers.items():
        if [conversation_text(row["prompt"]) for row in rows] != [
            conversation_text(row["prompt"]) for row in first
        ]:
            raise ValueError(f"{name} answers other prompts than the first, or in another order.")
        found[name] = figures(rows, samples)
        if rows is not first and "score" in rows[0]:
            found[name] |= gains(rows, first, samples)
        if rows is not first and judge is not None:
            won = judge(rows, first)
            found[name] |= win_rates("judge's win rate", won, rows, first, samples)
        found[name] |= exact(rows, samples)
    return found


def figures(rows: Answers, samples: int) -> Figures:
    """What can be said of one model's answers alone; intervals are over prompts."""
    said, lengths = [conversation_text(row["completion"]) for row in rows], numbers(rows, "length")
    found: Figures = {"prompts": len(rows) // samples}
    if "score" in rows[0]:
        scores = numbers(rows, "score")
        interval = bootstrap(per_prompt(scores, samples), 1000)
        found |= {"reward": mean(scores), "reward, 95 %": [*interval]}
    return {
        **found,
        "KL to the reference, nats per response": mean(numbers(rows, "kl")),
        "length, tokens": mean(lengths),
        "cut off": mean([float(bool(row["truncated"])) for row in rows]),
        "distinct-1": distinct(said, 1),
        "distinct-2": distinct(said, 2),
    }


def gains(rows: Answers, others: Answers, samples: int) -> Figures:
    """By how much, and how often, the answers beat the first model's by reward."""
    mine, theirs = numbers(rows, "score"), numbers(others, "score")
    each = [a - b for a, b in zip(mine, theirs, strict=True)]
    return {
        "gain": mean(each),
        "gain, 95 %": [*bootstrap(per_prompt(each, samples), 1000)],
        **win_rates("win rate", wins(mine, theirs), rows, others, samples),
    }


def win_rates(
    name: str, won: Sequence[float], rows: Answers, others: Answers, samples: int
) -> Figures:
    """How often the answers win, as they are and at equal length.

    Args:
        name: Of the figure.
        won: [N] 1, 1/2 or 0, sample by sample.
        rows: [N] answers.
        others: [N] the first model's.
        samples: Answers per prompt.
    """
    each = per_prompt(won, samples)
    lengths, other_lengths = (
        per_prompt(numbers(side, "length"), samples) for side in (rows, others)
    )
    fair, interval = at_equal_length(each, lengths, other_lengths)
    return {
        name: mean(won),
        f"{name}, 95 %": [*bootstrap(each, 1000)],
        f"{name} at equal length": fair,
        f"{name} at equal length, 95 %": [*interval],
    }


def exact(rows: Answers, samples: int) -> Figures:
    """Of each reward source that says 0 or 1: the share of 1, and pass@k up to all samples."""
    found: Figures = {}
    for name in sorted(name for name in rows[0] if name.startswith("scores/")):
        scores = numbers(rows, name)
        groups = [scores[i : i + samples] for i in range(0, len(scores), samples)]
        groups = [group for group in groups if not any(math.isnan(score) for score in group)]
        values = {score for group in groups for score in group}
        if not values or not values <= {0.0, 1.0}:
            continue
        source = name.removeprefix("scores/")
        right = [round(sum(group)) for group in groups]
        found[f"{source}, exact match"] = mean([number / samples for number in right])
        for k in [2**power for power in range(samples.bit_length())] if samples > 1 else []:
            found[f"{source}, pass@{k}"] = pass_at(k, right, samples)
    return found


def per_prompt(values: Sequence[float], samples: int) -> list[float]:
    """[B] means over the samples of a prompt."""
    return [mean(values[i : i + samples]) for i in range(0, len(values), samples)]


def shown(found: dict[str, Figures]) -> Table:
    """A column per model; an interval stands behind its figure."""
    names = dict.fromkeys(name for each in found.values() for name in each)
    lines = {
        name: [said(each, name) for each in found.values()]
        for name in names
        if not name.endswith(", 95 %")
    }
    return comparison_table([*found], lines)


def said(figures: Figures, name: str) -> str:
    """1.25, and its interval on the next line; nothing where the model has no such figure."""
    if name not in figures:
        return ""
    interval = figures.get(f"{name}, 95 %")
    around = f"\n{interval[0]:.3g} to {interval[1]:.3g}" if isinstance(interval, list) else ""
    return f"{figures[name]:.4g}{around}"


def write(found: dict[str, Figures], reference: str, out: Path) -> None:
    """The figures as JSON.

    Args:
        found: By model.
        reference: What the KL is to.
        out: The file; its folder is created.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"reference": reference, "models": found}, indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")

"""Several models on the same prompts: reward, KL, win rate, diversity, exact match."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from lit_align.errors import UserError
from lit_align.evaluation.statistics import (
    ResponseRows,
    Statistics,
    bootstrap_interval,
    column_values,
    distinct_n,
    length_controlled_win_rate,
    mean,
    pairwise_wins,
    pass_at_k,
)
from lit_align.evaluation.tables import comparison_table
from lit_align.runs.run_folder import conversation_text

PairwiseJudge = Callable[[ResponseRows, ResponseRows], list[float]]


def prompt_texts(rows: ResponseRows) -> list[str]:
    """Return the prompt of each row as text."""
    return [conversation_text(row["prompt"]) for row in rows]


def compare_models(
    responses: dict[str, ResponseRows], num_samples: int, judge: PairwiseJudge | None = None
) -> dict[str, Statistics]:
    """The figures of each model; the first is what the others are compared with.

    Args:
        responses: By model, to the same prompts in the same order, a prompt's side by side.
        num_samples: Answers per prompt.
        judge: Says of each pair of answers whether the first one wins, beside their rewards.
    """
    first = next(iter(responses.values()))
    if not first:
        raise UserError("there are no answers to compare: the evaluation rows are empty.")
    statistics = {}
    for name, rows in responses.items():
        if [conversation_text(row["prompt"]) for row in rows] != [
            conversation_text(row["prompt"]) for row in first
        ]:
            raise UserError(f"{name} answers other prompts than the first, or in another order.")
        statistics[name] = model_statistics(rows, num_samples)
        if rows is not first and "score" in rows[0]:
            statistics[name] |= gains_over_first(rows, first, num_samples)
        if rows is not first and judge is not None:
            wins = judge(rows, first)
            statistics[name] |= win_rates("judge's win rate", wins, rows, first, num_samples)
        statistics[name] |= exact_match(rows, num_samples)
    return statistics


def model_statistics(rows: ResponseRows, num_samples: int) -> Statistics:
    """What can be said of one model's answers alone; intervals are over prompts."""
    texts, lengths = (
        [conversation_text(row["completion"]) for row in rows],
        column_values(rows, "length"),
    )
    statistics: Statistics = {"prompts": len(rows) // num_samples}
    if "score" in rows[0]:
        scores = column_values(rows, "score")
        interval = bootstrap_interval(mean_per_prompt(scores, num_samples), 1000)
        statistics |= {"reward": mean(scores), "reward, 95 %": [*interval]}
    return {
        **statistics,
        "KL to the reference, nats per response": mean(column_values(rows, "kl")),
        "length, tokens": mean(lengths),
        "cut off": mean([float(bool(row["truncated"])) for row in rows]),
        "distinct-1": distinct_n(texts, 1),
        "distinct-2": distinct_n(texts, 2),
    }


def gains_over_first(rows: ResponseRows, others: ResponseRows, num_samples: int) -> Statistics:
    """By how much, and how often, the answers beat the first model's by reward."""
    mine, theirs = column_values(rows, "score"), column_values(others, "score")
    each = [a - b for a, b in zip(mine, theirs, strict=True)]
    return {
        "gain": mean(each),
        "gain, 95 %": [*bootstrap_interval(mean_per_prompt(each, num_samples), 1000)],
        **win_rates("win rate", pairwise_wins(mine, theirs), rows, others, num_samples),
    }


def win_rates(
    name: str, wins: Sequence[float], rows: ResponseRows, others: ResponseRows, num_samples: int
) -> Statistics:
    """How often the answers win, as they are and at equal length.

    Args:
        name: Of the figure.
        wins: [N] 1, 1/2 or 0, sample by sample.
        rows: [N] answers.
        others: [N] the first model's.
        num_samples: Answers per prompt.
    """
    each = mean_per_prompt(wins, num_samples)
    lengths, other_lengths = (
        mean_per_prompt(column_values(side, "length"), num_samples) for side in (rows, others)
    )
    rate, interval = length_controlled_win_rate(each, lengths, other_lengths)
    return {
        name: mean(wins),
        f"{name}, 95 %": [*bootstrap_interval(each, 1000)],
        f"{name} at equal length": rate,
        f"{name} at equal length, 95 %": [*interval],
    }


def exact_match(rows: ResponseRows, num_samples: int) -> Statistics:
    """Of each reward source that says 0 or 1: the share of 1, and pass@k up to all samples."""
    statistics: Statistics = {}
    for name in sorted(name for name in rows[0] if name.startswith("scores/")):
        scores = column_values(rows, name)
        groups = [scores[i : i + num_samples] for i in range(0, len(scores), num_samples)]
        groups = [group for group in groups if not any(math.isnan(score) for score in group)]
        values = {score for group in groups for score in group}
        if not values or not values <= {0.0, 1.0}:
            continue
        source = name.removeprefix("scores/")
        num_correct = [round(sum(group)) for group in groups]
        statistics[f"{source}, exact match"] = mean(
            [correct / num_samples for correct in num_correct]
        )
        for k in [2**power for power in range(num_samples.bit_length())] if num_samples > 1 else []:
            statistics[f"{source}, pass@{k}"] = pass_at_k(k, num_correct, num_samples)
    return statistics


def mean_per_prompt(values: Sequence[float], num_samples: int) -> list[float]:
    """[B] means over the samples of a prompt."""
    return [mean(values[i : i + num_samples]) for i in range(0, len(values), num_samples)]


def model_comparison_table(statistics: dict[str, Statistics]) -> Table:
    """A column per model; an interval stands behind its figure."""
    names = dict.fromkeys(name for each in statistics.values() for name in each)
    lines = {
        name: [format_statistic(each, name) for each in statistics.values()]
        for name in names
        if not name.endswith(", 95 %")
    }
    return comparison_table([*statistics], lines)


def format_statistic(statistics: Statistics, name: str) -> str:
    """1.25, and its interval on the next line; nothing where the model has no such figure."""
    if name not in statistics:
        return ""
    interval = statistics.get(f"{name}, 95 %")
    interval_text = (
        f"\n{interval[0]:.3g} to {interval[1]:.3g}" if isinstance(interval, list) else ""
    )
    return f"{statistics[name]:.4g}{interval_text}"


def write_evaluation(statistics: dict[str, Statistics], reference: str, out: Path) -> None:
    """The figures as JSON.

    Args:
        statistics: By model.
        reference: What the KL is to.
        out: The file; its folder is created.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"reference": reference, "models": statistics}, indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")

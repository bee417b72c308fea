"""Compare models on the same prompts: reward, KL, win rate, diversity, exact match, pass@k."""

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
BOOTSTRAP_ROUNDS = 1000  # resampled means per interval


def prompt_texts(rows: ResponseRows) -> list[str]:
    """Return the prompt of each row as text."""
    return [conversation_text(row["prompt"]) for row in rows]


def compare_models(
    responses: dict[str, ResponseRows], num_samples: int, judge: PairwiseJudge | None = None
) -> dict[str, Statistics]:
    """Return the statistics of each model. The others are compared with the first model.

    Args:
        responses: N rows of each model, by its name. All models have the same prompts in the same
            order, and the samples of a prompt follow each other.
        num_samples: Number of responses per prompt.
        judge: Returns the wins of the first rows over the second. None: only rewards decide.
    """
    first = next(iter(responses.values()))
    if not first:
        raise UserError(
            "There are no responses to compare: the data set has no evaluation rows. Set "
            "--data.eval_path, --data.eval_split or --data.eval_fraction."
        )
    statistics = {}
    for name, rows in responses.items():
        if prompt_texts(rows) != prompt_texts(first):
            raise UserError(f"{name} has other prompts than the first model, or another order.")
        statistics[name] = model_statistics(rows, num_samples)
        if rows is not first and "score" in rows[0]:
            statistics[name] |= gains_over_first(rows, first, num_samples)
        if rows is not first and judge is not None:
            wins = judge(rows, first)
            statistics[name] |= win_rates("judge's win rate", wins, rows, first, num_samples)
        statistics[name] |= exact_match(rows, num_samples)
    return statistics


def model_statistics(rows: ResponseRows, num_samples: int) -> Statistics:
    """Return the statistics of one model alone. Intervals are over prompts, not over samples.

    Args:
        rows: N rows of the model.
        num_samples: Number of responses per prompt.
    """
    texts = [conversation_text(row["completion"]) for row in rows]
    statistics: Statistics = {"prompts": len(rows) // num_samples}
    if "score" in rows[0]:
        scores = column_values(rows, "score")
        interval = bootstrap_interval(mean_per_prompt(scores, num_samples), BOOTSTRAP_ROUNDS)
        statistics |= {"reward": mean(scores), "reward, 95 %": [*interval]}
    return {
        **statistics,
        "KL to the reference, nats per response": mean(column_values(rows, "kl")),
        "length, tokens": mean(column_values(rows, "length")),
        "cut off": mean([float(bool(row["truncated"])) for row in rows]),
        "distinct-1": distinct_n(texts, 1),
        "distinct-2": distinct_n(texts, 2),
    }


def gains_over_first(rows: ResponseRows, others: ResponseRows, num_samples: int) -> Statistics:
    """Return the mean gain in reward over the first model, and the win rate by reward.

    Args:
        rows: N rows of a model.
        others: N rows of the first model.
        num_samples: Number of responses per prompt.
    """
    mine, theirs = column_values(rows, "score"), column_values(others, "score")
    gains = [a - b for a, b in zip(mine, theirs, strict=True)]
    return {
        "gain": mean(gains),
        "gain, 95 %": [*bootstrap_interval(mean_per_prompt(gains, num_samples), BOOTSTRAP_ROUNDS)],
        **win_rates("win rate", pairwise_wins(mine, theirs), rows, others, num_samples),
    }


def win_rates(
    name: str, wins: Sequence[float], rows: ResponseRows, others: ResponseRows, num_samples: int
) -> Statistics:
    """Return the win rate over the first model, and the win rate at equal length.

    Args:
        name: Name of the statistic.
        wins: [N] 1, 0.5 or 0 for each response.
        rows: N rows of a model.
        others: N rows of the first model.
        num_samples: Number of responses per prompt.
    """
    wins_per_prompt = mean_per_prompt(wins, num_samples)
    lengths, other_lengths = (
        mean_per_prompt(column_values(side, "length"), num_samples) for side in (rows, others)
    )
    rate, interval = length_controlled_win_rate(wins_per_prompt, lengths, other_lengths)
    return {
        name: mean(wins),
        f"{name}, 95 %": [*bootstrap_interval(wins_per_prompt, BOOTSTRAP_ROUNDS)],
        f"{name} at equal length": rate,
        f"{name} at equal length, 95 %": [*interval],
    }


def exact_match(rows: ResponseRows, num_samples: int) -> Statistics:
    """Return the fraction of ones and pass@k of each reward function that returns 0 or 1.

    Args:
        rows: N rows of a model.
        num_samples: Number of responses per prompt. pass@k has k = 1, 2, 4, ... up to it.
    """
    statistics: Statistics = {}
    for name in sorted(name for name in rows[0] if name.startswith("scores/")):
        scores = column_values(rows, name)
        groups = [scores[i : i + num_samples] for i in range(0, len(scores), num_samples)]
        # NaN: the function does not apply to the prompt
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
    """Return [B] means over the samples of each prompt.

    Example:
        >>> mean_per_prompt([1.0, 3.0, 5.0, 7.0], num_samples=2)
        [2.0, 6.0]
    """
    return [mean(values[i : i + num_samples]) for i in range(0, len(values), num_samples)]


def model_comparison_table(statistics: dict[str, Statistics]) -> Table:
    """Return a table with a column per model. An interval is printed below its statistic."""
    names = dict.fromkeys(name for each in statistics.values() for name in each)
    lines = {
        name: [format_statistic(each, name) for each in statistics.values()]
        for name in names
        if not name.endswith(", 95 %")
    }
    return comparison_table([*statistics], lines)


def format_statistic(statistics: Statistics, name: str) -> str:
    r"""Return a statistic with its interval on the next line, or an empty text without one.

    Example:
        >>> format_statistic({"gain": 0.5, "gain, 95 %": [0.25, 0.75]}, "gain")
        '0.5\n0.25 to 0.75'
    """
    if name not in statistics:
        return ""
    interval = statistics.get(f"{name}, 95 %")
    interval_text = (
        f"\n{interval[0]:.3g} to {interval[1]:.3g}" if isinstance(interval, list) else ""
    )
    return f"{statistics[name]:.4g}{interval_text}"


def write_evaluation(statistics: dict[str, Statistics], reference: str, out: Path) -> None:
    """Write the statistics as JSON.

    Args:
        statistics: Statistics of each model, by its name.
        reference: Name of the reference model of the KL.
        out: File to write. Its folder is created.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"reference": reference, "models": statistics}, indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")

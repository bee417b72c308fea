"""Statistics by which answers are judged: means with intervals, win rates, diversity, pass@k."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ResponseRows = list[dict[str, object]]
Statistics = dict[str, float | list[float]]  # by name; an interval stands under `<name>, 95 %`
Interval = tuple[float, float]
FloatArray = NDArray[np.float64]


def read_predictions(file: Path) -> ResponseRows:
    """The answers that a `predict` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def mean(values: Sequence[float]) -> float:
    """Their arithmetic mean."""
    return sum(values) / len(values)


def column_values(rows: ResponseRows, name: str) -> list[float]:
    """A column of figures."""
    return [float(str(row[name])) for row in rows]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of n words (arXiv:1510.03055); 0 if there is none."""
    words = [text.split() for text in texts]
    runs = [tuple(each[i : i + n]) for each in words for i in range(len(each) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def distinct_2(rows: ResponseRows) -> float:
    """Share of different ones among all pairs of neighbouring words."""
    return distinct_n([str(row["completion"]) for row in rows], 2)


def bootstrap_interval(values: Sequence[float], rounds: int = 2000) -> Interval:
    """95 % interval of the mean, for example of paired differences."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(rounds))
    return means[rounds // 40], means[-rounds // 40]


def pairwise_wins(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """[N] 1 where an answer scores more than the other to the same prompt, 1/2 where both tie."""
    return [float(a > b) + 0.5 * (a == b) for a, b in zip(scores, others, strict=True)]


def length_controlled_win_rate(
    wins: Sequence[float], lengths: Sequence[float], others: Sequence[float], rounds: int = 500
) -> tuple[float, Interval]:
    """The win rate if both answered at the same length, and its 95 % bootstrap interval.

    A logistic regression of the wins on tanh of the difference in length, over its standard
    deviation, read at 0 (arXiv:2404.04475 eq. 2, with one judge and without the term of the
    instruction). A small ridge keeps it finite where every answer wins.

    Args:
        wins: [N] as `pairwise_wins` has it.
        lengths: [N] tokens.
        others: [N] tokens of the other's answers.
        rounds: Of the bootstrap.
    """
    y, difference = np.array(wins), np.array(lengths) - np.array(others)
    std = difference.std()
    x = np.tanh(difference / std) if std > 0 else np.zeros_like(difference)
    features = np.stack([np.ones_like(x), x], 1)
    draws = np.random.default_rng(0).multinomial(len(y), [1 / len(y)] * len(y), rounds)
    weights = np.concatenate([np.ones((1, len(y))), draws.astype(float)])
    rates = 1 / (1 + np.exp(-fit_logistic(features, y, weights)[:, 0]))
    low, high = np.quantile(rates[1:], [0.025, 0.975])
    return float(rates[0]), (float(low), float(high))


def fit_logistic(
    features: FloatArray, y: FloatArray, weights: FloatArray, ridge: float = 1e-2
) -> FloatArray:
    """[rounds, 2] coefficients by Newton's method, one fit for each row of weights.

    Args:
        features: [N, 2].
        y: [N] from 0 to 1.
        weights: [rounds, N].
        ridge: Pulls the coefficients towards 0.
    """
    theta = np.zeros((len(weights), features.shape[1]))
    for _ in range(40):
        p = 1 / (1 + np.exp(-theta @ features.T))
        gradient = (weights * (y - p)) @ features - ridge * theta
        curvature = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), features, features)
        step = np.linalg.solve(curvature + ridge * np.eye(2), gradient[..., None])[..., 0]
        theta += step.clip(-2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return theta


def pass_at_k(k: int, num_correct: Sequence[int], num_samples: int) -> float:
    """The chance that one of k answers is right, without bias (arXiv:2107.03374 eq. 1).

    Args:
        k: Answers that may be tried.
        num_correct: Of each prompt, how many of its answers are right.
        num_samples: Answers per prompt, at least k.
    """
    num_subsets = math.comb(num_samples, k)
    return mean([1 - math.comb(num_samples - correct, k) / num_subsets for correct in num_correct])

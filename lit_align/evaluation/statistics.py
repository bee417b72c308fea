"""Statistics that compare responses: means with intervals, win rates, diversity, pass@k."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ResponseRows = list[dict[str, object]]
Statistics = dict[str, float | list[float]]  # by name; an interval has the key `<name>, 95 %`
Interval = tuple[float, float]
FloatArray = NDArray[np.float64]


def read_predictions(file: Path) -> ResponseRows:
    """Read the rows of `predictions.jsonl`, which `lit-align predict` writes."""
    # str.splitlines would also split at U+2028, which JSON allows inside a text
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    return sum(values) / len(values)


def column_values(rows: ResponseRows, name: str) -> list[float]:
    """Return a column of numbers.

    Example:
        >>> column_values([{"score": 1}, {"score": 0.5}], "score")
        [1.0, 0.5]
    """
    return [float(str(row[name])) for row in rows]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the fraction of distinct n-grams of words (arXiv:1510.03055), 0 without n-grams.

    Example:
        >>> distinct_n(["a b a b"], 1)  # the words a and b among 4
        0.5
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(each[i : i + n]) for each in words for i in range(len(each) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_2(rows: ResponseRows) -> float:
    """Return the fraction of distinct pairs of neighboring words in all completions."""
    return distinct_n([str(row["completion"]) for row in rows], 2)


def bootstrap_interval(values: Sequence[float], rounds: int = 2000) -> Interval:
    """Return the 95 % bootstrap interval of a mean, for example of paired differences.

    Args:
        values: Independent values, such as one per prompt.
        rounds: Number of resampled means. The seed is fixed.

    Example:
        >>> bootstrap_interval([2.0, 2.0, 2.0], rounds=40)
        (2.0, 2.0)
    """
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(rounds))
    return means[rounds // 40], means[-rounds // 40]


def pairwise_wins(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return [N] wins: 1 if a response scores more than the other one, 0.5 for a tie, else 0.

    Args:
        scores: [N] scores.
        others: [N] scores of the other model's responses to the same prompts.

    Example:
        >>> pairwise_wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
        [0.0, 0.5, 1.0]
    """
    return [float(a > b) + 0.5 * (a == b) for a, b in zip(scores, others, strict=True)]


def length_controlled_win_rate(
    wins: Sequence[float], lengths: Sequence[float], others: Sequence[float], rounds: int = 500
) -> tuple[float, Interval]:
    """Return the win rate at equal length, and its 95 % bootstrap interval.

    A logistic regression predicts the wins from tanh of the difference in length, divided by the
    standard deviation of the differences. The win rate is its prediction at difference 0
    (arXiv:2404.04475 eq. 2, with one judge and without the instruction's term). A small
    L2 penalty keeps the coefficients finite if one model always wins.

    Args:
        wins: [N] wins from 0 to 1, as `pairwise_wins` returns them.
        lengths: [N] lengths in tokens.
        others: [N] lengths of the other model's responses in tokens.
        rounds: Number of resampled regressions. The seed is fixed.
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
    """Fit one logistic regression per row of weights; return [rounds, 2] coefficients.

    Args:
        features: [N, 2] features.
        y: [N] targets from 0 to 1.
        weights: [rounds, N] weight of each row in each regression.
        ridge: L2 penalty, which keeps the coefficients of separable rows finite.

    Example:
        >>> fitted = fit_logistic(np.ones((2, 2)), np.array([0.0, 1.0]), np.ones((1, 2)))
        >>> fitted.tolist()  # as many wins as losses: the log-odds are 0
        [[0.0, 0.0]]
    """
    theta = np.zeros((len(weights), features.shape[1]))
    for _ in range(40):  # Newton's method
        p = 1 / (1 + np.exp(-theta @ features.T))
        gradient = (weights * (y - p)) @ features - ridge * theta
        curvature = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), features, features)
        step = np.linalg.solve(curvature + ridge * np.eye(2), gradient[..., None])[..., 0]
        theta += step.clip(-2, 2)  # far from the optimum a full step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    return theta


def pass_at_k(k: int, num_correct: Sequence[int], num_samples: int) -> float:
    """Return the unbiased probability that one of k responses is correct.

    The mean over prompts of arXiv:2107.03374 eq. 1.

    Args:
        k: Number of responses that may be tried, at most `num_samples`.
        num_correct: [B] number of correct responses per prompt.
        num_samples: Number of responses per prompt.

    Example:
        >>> pass_at_k(2, [1], 4)  # 3 of the 6 pairs of responses have the correct one
        0.5
    """
    num_subsets = math.comb(num_samples, k)
    return mean([1 - math.comb(num_samples - correct, k) / num_subsets for correct in num_correct])

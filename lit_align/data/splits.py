"""Held-out rows and oversampled rows of a data set."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Any


def holdout_split(
    examples: list[Any], fraction: float, seed: int, group_key: Callable[[Any], Hashable] = id
) -> tuple[list[Any], list[Any]]:
    """Return the training examples and a random fraction of held-out ones, both in data order.

    Examples with equal keys form a group. A group is held out as a unit, and a fraction above 0
    holds out at least one group.

    Args:
        examples: Encoded rows of one source.
        fraction: Held-out groups as a fraction of all groups, from 0 to below 1.
        seed: Seed of the random choice.
        group_key: Function from an example to its group. Default: each example is a group.

    Example:
        >>> train, held_out = holdout_split([1, 11, 2, 12], 0.5, 0, lambda number: number % 10)
        >>> sorted([train, held_out])
        [[1, 11], [2, 12]]
    """
    groups = list(dict.fromkeys(map(group_key, examples)))
    count = max(1, round(fraction * len(groups))) if fraction else 0
    held_out = {groups[i] for i in random.Random(seed).sample(range(len(groups)), count)}
    train_examples = [example for example in examples if group_key(example) not in held_out]
    return train_examples, [example for example in examples if group_key(example) in held_out]


def oversample(examples: list[Any], weight: float, seed: int) -> list[Any]:
    """Return `weight` copies of the examples; the fractional part is a random subset.

    Args:
        examples: Training examples of one source.
        weight: Number of copies. 2.5 gives two copies and half of the examples a third time.
        seed: Seed of the random subset.

    Example:
        >>> len(oversample(["a", "b"], 2.5, seed=0))
        5
    """
    num_copies = int(weight)
    count = round((weight - num_copies) * len(examples))
    part = sorted(random.Random(seed).sample(range(len(examples)), count))
    return examples * num_copies + [examples[i] for i in part]

"""Several sources as one judge: names, weights, and what happens to a prompt one cannot score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container

import torch

from lit_align.batches import Experience
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import Caller, Failure, shown


class Panel:
    """Sources whose weighted sum is the score. A source that does not apply to a row adds nothing.

    Args:
        sources: One or several.
        weights: What each source's score is multiplied with, 1 by default.
        caller: Asks them.
    """

    def __init__(
        self,
        sources: RewardFunction | list[RewardFunction],
        weights: list[float] | None,
        caller: Caller,
    ):
        listed = [sources] if isinstance(sources, RewardFunction) else sources
        self.weights = [1.0] * len(listed) if weights is None else weights
        if not listed:
            raise ValueError("give at least one reward source")
        if len(self.weights) != len(listed):
            raise ValueError(f"{len(self.weights)} weights for {len(listed)} reward sources")
        self.sources: dict[str, RewardFunction] = {}
        for source in listed:
            self.sources[distinct(source.name, self.sources)] = source
        self.caller = caller

    def __call__(self, batch: Experience) -> list[bool]:
        """Writes `scores` and a column `scores/<name>` per source, NaN where it does not apply.

        Returns:
            [N] False where a row is skipped with its prompt: score 0, nothing in its mask.
        """
        outcomes = self.caller(self.sources, batch)
        skipped = {
            batch.group[row]
            for column in outcomes.values()
            for row, outcome in enumerate(column)
            if isinstance(outcome, Failure)
        }
        scored = [group not in skipped for group in batch.group]
        for name, column in outcomes.items():
            batch.columns[f"scores/{name}"] = [
                outcome if known and isinstance(outcome, float) else math.nan
                for outcome, known in zip(column, scored, strict=True)
            ]
        totals = [self.total(batch, row) if known else 0.0 for row, known in enumerate(scored)]
        device = batch.responses.device
        batch.scores = torch.tensor(totals, dtype=torch.float32, device=device)
        if skipped:
            known_rows = torch.tensor(scored, device=device).unsqueeze(1)
            batch.response_mask = batch.response_mask & known_rows
        return scored

    def total(self, batch: Experience, row: int) -> float:
        """The weighted sum over the sources that apply to a row."""
        weighted = [
            weight * batch.columns[f"scores/{name}"][row]
            for name, weight in zip(self.sources, self.weights, strict=True)
        ]
        applying = [term for term in weighted if not math.isnan(term)]
        if not applying:
            raise RewardError(f"no reward source applies to this row\n{shown(batch, row)}")
        return math.fsum(applying)


def distinct(name: str, taken: Container[str]) -> str:
    """A name that is not taken: the second `length` is `length_2`."""
    tries = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(each for each in tries if each not in taken)

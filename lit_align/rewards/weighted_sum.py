"""Several functions as one judge: names, weights, and what happens to a prompt one cannot score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container

import torch

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import RewardExecutor, RowFailure, format_row


class WeightedSum:
    """Functions whose weighted sum is the score. One that does not apply to a row adds nothing.

    Args:
        functions: One or several.
        weights: Factor of a score, 1 by default.
        executor: Asks them.
    """

    def __init__(
        self,
        functions: RewardFunction | list[RewardFunction],
        weights: list[float] | None,
        executor: RewardExecutor,
    ):
        function_list = [functions] if isinstance(functions, RewardFunction) else functions
        self.weights = [1.0] * len(function_list) if weights is None else weights
        if not function_list:
            raise UserError("give at least one reward function")
        if len(self.weights) != len(function_list):
            raise UserError(
                f"{len(self.weights)} weights for {len(function_list)} reward functions"
            )
        self.functions: dict[str, RewardFunction] = {}
        for function in function_list:
            self.functions[unique_name(function.name, self.functions)] = function
        self.executor = executor

    def __call__(self, batch: Experience) -> list[bool]:
        """Writes `scores` and a column `scores/<name>` per function, NaN where it does not apply.

        Returns:
            [N] False where a row is skipped with its prompt: score 0, nothing in its mask.
        """
        outcomes = self.executor(self.functions, batch)
        skipped = {
            batch.group[row]
            for column in outcomes.values()
            for row, outcome in enumerate(column)
            if isinstance(outcome, RowFailure)
        }
        is_scored = [group not in skipped for group in batch.group]
        for name, column in outcomes.items():
            batch.columns[f"scores/{name}"] = [
                outcome if has_score and isinstance(outcome, float) else math.nan
                for outcome, has_score in zip(column, is_scored, strict=True)
            ]
        totals = [
            self.weighted_total(batch, row) if has_score else 0.0
            for row, has_score in enumerate(is_scored)
        ]
        device = batch.responses.device
        batch.scores = torch.tensor(totals, dtype=torch.float32, device=device)
        if skipped:
            scored_rows = torch.tensor(is_scored, device=device).unsqueeze(1)
            batch.response_mask = batch.response_mask & scored_rows
        return is_scored

    def weighted_total(self, batch: Experience, row: int) -> float:
        """The weighted sum over the functions that apply to a row."""
        weighted = [
            weight * batch.columns[f"scores/{name}"][row]
            for name, weight in zip(self.functions, self.weights, strict=True)
        ]
        applying = [term for term in weighted if not math.isnan(term)]
        if not applying:
            raise RewardError(f"no reward function applies to this row\n{format_row(batch, row)}")
        return math.fsum(applying)


def unique_name(name: str, taken: Container[str]) -> str:
    """A name that is not taken: the second `length` is `length_2`."""
    candidates = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in taken)

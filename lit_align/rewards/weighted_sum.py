"""Weighted sum of reward functions: names, weights and skipped prompts."""

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
    """The score as a weighted sum of reward functions.

    If a function returns None for a row, it is left out of the sum.

    Args:
        functions: One function or several.
        weights: Factor of each function's scores. Default: 1.
        executor: Calls the functions.
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
            raise UserError("There is no reward function. Set --reward.functions.")
        if len(self.weights) != len(function_list):
            raise UserError(
                f"weights must have one number per reward function, found {len(self.weights)} "
                f"weights for {len(function_list)} functions. Set --reward.weights."
            )
        self.functions: dict[str, RewardFunction] = {}
        for function in function_list:
            self.functions[unique_name(function.name, self.functions)] = function
        self.executor = executor

    def __call__(self, batch: Experience) -> list[bool]:
        """Add `scores` [N] and a column `scores/<name>` per function, NaN if it does not apply.

        Args:
            batch: N rows with responses.

        Returns:
            N flags. A row of a skipped prompt has False, the score 0 and an empty mask.
        """
        outcomes = self.executor(self.functions, batch)
        # Advantages need the scores of all responses to a prompt: a failed row skips its prompt.
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
            # Without mask a row has no loss and no metric, so nothing else needs to know.
            batch.response_mask = batch.response_mask & scored_rows
        return is_scored

    def weighted_total(self, batch: Experience, row: int) -> float:
        """Return the weighted sum over the functions that apply to a row."""
        weighted = [
            weight * batch.columns[f"scores/{name}"][row]
            for name, weight in zip(self.functions, self.weights, strict=True)
        ]
        applying = [term for term in weighted if not math.isnan(term)]
        if not applying:
            raise RewardError(
                f"no reward function applies to this row. Return a number for it.\n"
                f"{format_row(batch, row)}"
            )
        return math.fsum(applying)  # exact, so the order of the functions does not matter


def unique_name(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken yet.

    Example:
        >>> unique_name("length", ["length"])
        'length_2'
    """
    candidates = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in taken)

"""Where scores come from."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.models.roles import Role

Scores = Tensor | Sequence[float | None]


class RewardError(UserError):
    """A reward function could not score: says which function, on what, and what happened."""


class RewardFunction(ABC):
    """Judges whole responses: a rule, a frozen reward model, any Python function.

    Raising a `RewardError` ends the run; any other error is blamed on a row, if one can be found.
    """

    @property
    def name(self) -> str:
        """What metrics and tables call it: `rewards/<name>/mean`."""
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        return re.sub(words, "_", type(self).__name__).lower()

    @property
    def is_async(self) -> bool:
        """Whether a call returns something to await, while the other functions run."""
        return inspect.iscoroutinefunction(self.__call__)

    def setup(self, algorithm: LightningModule) -> None:  # noqa: B027
        """Loads weights, if there are any. Comes before each fit, validate, test and predict.

        Args:
            algorithm: What is trained; its networks exist by the first call, not yet here.
        """

    def all_roles(self) -> list[Role]:
        """The networks that judge, for the table at the start of a run; none by default."""
        return []

    @abstractmethod
    def __call__(self, batch: Experience) -> Scores | Awaitable[Scores]:
        """[N] scores, higher is better; None where this function does not apply to a row."""


def last_turn(turns: str | list[dict[str, str]]) -> str:
    """A plain text as it is; of a conversation, what was said last."""
    return turns if isinstance(turns, str) else turns[-1]["content"]


def completion_texts(batch: Experience) -> list[str]:
    """[N] what the policy said, without the stop."""
    return [last_turn(completion) for completion in batch.columns["completion"]]


def dataset_column(batch: Experience, name: str) -> list[Any]:
    """[N] a column of the data set.

    Args:
        batch: Answered rows.
        name: Of the column.
    """
    if name not in batch.columns:
        known = ", ".join(batch.columns)
        raise RewardError(f"reads the column '{name}', but the data set has only: {known}")
    return batch.columns[name]

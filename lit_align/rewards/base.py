"""Base class of reward functions, and access to the texts that they score."""

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
    """A failure of a reward function. The message names the function, the row and the cause."""


class RewardFunction(ABC):
    """Scores whole responses: a rule, a frozen reward model or any Python function.

    A `RewardError` ends the run at once. After any other error the rows are scored one by one, to
    find the row that fails.
    """

    @property
    def name(self) -> str:
        """Name in metrics and tables (`rewards/<name>/mean`): the class name in snake case."""
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        return re.sub(words, "_", type(self).__name__).lower()

    @property
    def is_async(self) -> bool:
        """True if a call returns an awaitable, so that other functions can run meanwhile."""
        return inspect.iscoroutinefunction(self.__call__)

    def setup(self, algorithm: LightningModule) -> None:  # noqa: B027
        """Load weights, if there are any. Called before each fit, validate, test and predict.

        Args:
            algorithm: The algorithm. Its networks do not exist yet.
        """

    def all_roles(self) -> list[Role]:
        """Return the networks that score, for the table at the start of a run. Default: none."""
        return []

    @abstractmethod
    def __call__(self, batch: Experience) -> Scores | Awaitable[Scores]:
        """Return a score per row [N], higher is better. None: the function does not apply."""


def last_turn(turns: str | list[dict[str, str]]) -> str:
    """Return a text unchanged, or the content of the last message of a conversation.

    Args:
        turns: A text, or messages with role and content.

    Example:
        >>> last_turn("4"), last_turn([{"role": "user", "content": "2 + 2?"}])
        ('4', '2 + 2?')
    """
    return turns if isinstance(turns, str) else turns[-1]["content"]


def completion_texts(batch: Experience) -> list[str]:
    """Return the N completions as texts, without the stop token.

    Args:
        batch: N rows with responses.

    Example:
        >>> completion_texts(Experience({"completion": ["a", [{"role": "x", "content": "b"}]]}))
        ['a', 'b']
    """
    return [last_turn(completion) for completion in batch.columns["completion"]]


def dataset_column(batch: Experience, name: str) -> list[Any]:
    """Return the N values of a column of the data set.

    Args:
        batch: N rows with responses.
        name: Name of the column.
    """
    if name not in batch.columns:
        known = ", ".join(batch.columns)
        raise RewardError(
            f"reads the column '{name}', but the data set has only: {known}. Set the reward's "
            f"column, or rename one with --data.rename_columns."
        )
    return batch.columns[name]

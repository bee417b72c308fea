"""Which rows of an optimizer step have a finite loss."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class FiniteRows(NamedTuple):
    """Rows of one micro-batch, and whether their losses are finite.

    Args:
        rows: [n] indices of the rows in the batch of the optimizer step.
        columns: The data set's own columns, if the batch has them.
        finite: [n] bool on the device. Read it once per step, since reading waits for the device.
    """

    rows: list[int]
    columns: dict[str, list[Any]]
    finite: Tensor

"""Rows that are left out for what stands in a column."""

from __future__ import annotations

import re
from typing import Any

from lit_align.data.formats import parse_messages
from lit_align.data.sources import Row
from lit_align.errors import UserError


class RowFilter:
    """Which rows to leave out, and why.

    Args:
        patterns: For each column a regular expression; a row in which one is found is left out.
    """

    def __init__(self, patterns: dict[str, str]):
        self.patterns: dict[str, re.Pattern[str]] = {}
        for name, pattern in patterns.items():
            try:
                self.patterns[name] = re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"data.drop_matching: '{pattern}' is no regular expression: {error}"
                ) from None

    def drop_reason(self, row: Row) -> str | None:
        """Why a row is left out, None if it stays."""
        for name, pattern in self.patterns.items():
            if name not in row:
                raise UserError(f"there is no column '{name}' to search, only {', '.join(row)}")
            if pattern.search(cell_text(row[name])):
                return f"rows whose {name} matches {pattern.pattern}"
        return None


def cell_text(value: Any) -> str:
    """A cell as text: the words of a conversation, one turn per line; nothing for None."""
    if isinstance(value, dict | list):
        return "\n".join(str(turn["content"]) for turn in parse_messages(value))
    return "" if value is None else str(value)

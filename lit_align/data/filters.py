"""Row filter by regular expressions on columns."""

from __future__ import annotations

import re
from typing import Any

from lit_align.data.formats import parse_messages
from lit_align.data.sources import Row
from lit_align.errors import UserError


class RowFilter:
    """Filter that drops a row if a regular expression matches its column.

    Args:
        patterns: Regular expression by column name. It may match anywhere in the text.

    Example:
        >>> row_filter = RowFilter({"answer": "^$"})
        >>> row_filter.drop_reason({"answer": ""}), row_filter.drop_reason({"answer": "4"})
        ('rows whose answer matches ^$', None)
    """

    def __init__(self, patterns: dict[str, str]):
        self.patterns: dict[str, re.Pattern[str]] = {}
        for name, pattern in patterns.items():
            try:
                self.patterns[name] = re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"data.drop_matching: '{pattern}' is not a regular expression ({error}). "
                    "Set --data.drop_matching."
                ) from None

    def drop_reason(self, row: Row) -> str | None:
        """Return why a row is dropped, or None if it is kept.

        Example:
            >>> RowFilter({"level": "^3"}).drop_reason({"level": 35})
            'rows whose level matches ^3'
        """
        for name, pattern in self.patterns.items():
            if name not in row:
                raise UserError(
                    f"there is no column '{name}' to search, found {', '.join(row)}. "
                    "Set --data.drop_matching."
                )
            if pattern.search(cell_text(row[name])):
                return f"rows whose {name} matches {pattern.pattern}"
        return None


def cell_text(value: Any) -> str:
    r"""Return a cell as text: the contents of a conversation, one turn per line; "" for None.

    Example:
        >>> cell_text([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
        'hi\nyes'
    """
    if isinstance(value, dict | list):
        return "\n".join(str(turn["content"]) for turn in parse_messages(value))
    return "" if value is None else str(value)

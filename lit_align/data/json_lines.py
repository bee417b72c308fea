"""Reader of JSON lines: one JSON object per line of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_align.errors import UserError


def json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    r"""Yield the JSON object of each line that is not blank.

    Args:
        path: File of the text, for error messages.
        text: Content of the file. Only a newline ends a line.

    Raises:
        UserError: If a line is not a JSON object. The message has its line number.

    Example:
        >>> list(json_lines(Path("rows.jsonl"), '{"prompt": "a"}\n\n{"prompt": "b"}\n'))
        [{'prompt': 'a'}, {'prompt': 'b'}]
    """
    # str.splitlines would also split at U+2028, which JSON allows inside of a text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield parse_json_object(path, f"line {number}", line)


def parse_json_object(path: Path, location: str, line: str) -> dict[str, Any]:
    """Return one JSON object.

    Args:
        path: File of the object, for error messages.
        location: Place in the file, such as "line 3".
        line: Text of the object.

    Raises:
        UserError: If the text is not a JSON object.

    Example:
        >>> parse_json_object(Path("rows.jsonl"), "line 1", '{"score": 1}')
        {'score': 1}
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{location} of '{path}' is not valid JSON: {error}") from None
    return check_json_object(path, location, row)


def check_json_object(path: Path, location: str, value: Any) -> dict[str, Any]:
    """Return a parsed JSON value, which must be an object.

    Args:
        path: File of the value, for error messages.
        location: Place in the file, such as "row 3".
        value: Parsed JSON.

    Raises:
        UserError: If the value is not an object.

    Example:
        >>> check_json_object(Path("rows.json"), "row 0", {"score": 1})
        {'score': 1}
    """
    if not isinstance(value, dict):
        raise UserError(f"{location} of '{path}' is not a JSON object with named columns")
    return value

"""Rows of several published formats as one format: TRL's columns, plain or conversational.

The columns are prompt, completion, chosen, rejected, messages and text. ShareGPT conversations,
alpaca instructions and pairs with an implicit prompt are converted. Other columns are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lit_align.data.sources import Row
from lit_align.data.text import Message
from lit_align.errors import UserError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
HH_TURN = "\n\nAssistant:"


def add_renamed_columns(row: Row, columns: dict[str, str]) -> Row:
    """Return the row with additional names for its columns. The old names are kept.

    Args:
        row: One row of a data set.
        columns: New name by old name.

    Example:
        >>> add_renamed_columns({"question": "1+1?"}, {"question": "prompt"})
        {'question': '1+1?', 'prompt': '1+1?'}
    """
    for old in columns:
        if old not in row:
            raise UserError(
                f"there is no column '{old}' to rename, found {', '.join(row)}. "
                "Set --data.rename_columns."
            )
    return {**row, **{new: row[old] for old, new in columns.items()}}


def canonical_row(row: Row) -> Row:
    """Return the row with TRL's columns: prompt, completion, chosen, rejected or messages.

    Columns without a value are removed.

    Example:
        >>> canonical_row({"chosen": "The sky is blue.", "rejected": "The sky is green."})
        {'chosen': ' blue.', 'rejected': ' green.', 'prompt': 'The sky is'}
    """
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("prompt", "completion", "chosen", "rejected", "messages"):
        if isinstance(row.get(name), dict | list):
            row[name] = parse_messages(row[name])
    if "conversations" in row:
        conversation = parse_messages(row["conversations"])
        row |= {"prompt": conversation} if "chosen" in row else {"messages": conversation}
    if "instruction" in row and "prompt" not in row:
        row |= convert_alpaca(row)
    if "chosen" in row and "rejected" in row:
        row |= split_preference(row)
    return row


def parse_messages(value: Any) -> list[Message]:
    """Return messages with role and content, converted from ShareGPT's keys if necessary.

    Args:
        value: List of turns, or one turn.

    Example:
        >>> parse_messages({"from": "human", "value": "hi"})
        [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, dict):
        value = [value]
    messages = []
    for turn in value:
        if isinstance(turn, dict) and "from" in turn and "value" in turn:
            turn = {
                "role": SHAREGPT_ROLES.get(turn["from"], turn["from"]),
                "content": turn["value"],
            }
        if not (isinstance(turn, dict) and "role" in turn and "content" in turn):
            raise UserError(f"a message needs role and content (or from and value), found {turn}")
        messages.append(turn)
    return messages


def convert_alpaca(row: Row) -> Row:
    r"""Return prompt and completion, or a pair, of an alpaca row.

    Reads instruction, input, output, chosen and rejected, and the optional system and history.

    Example:
        >>> converted = convert_alpaca({"instruction": "add", "input": "1 1", "output": "2"})
        >>> converted["prompt"], converted["completion"][0]["content"]
        ([{'role': 'user', 'content': 'add\n1 1'}], '2')
    """
    parts = [row["instruction"], row.get("input", "")]
    prompt = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, response in row.get("history", []):
        prompt += [{"role": "user", "content": question}]
        prompt += [{"role": "assistant", "content": response}]
    prompt += [{"role": "user", "content": "\n".join(part for part in parts if part)}]
    found: Row = {"prompt": prompt}
    for old, new in {"output": "completion", "chosen": "chosen", "rejected": "rejected"}.items():
        if isinstance(row.get(old), str):
            found[new] = [{"role": "assistant", "content": row[old]}]
    return found


def split_preference(row: Row) -> Row:
    """Return prompt, chosen and rejected of a pair; both texts may contain the prompt.

    Example:
        >>> split_preference({"prompt": "a", "chosen": " b", "rejected": " c"})
        {'prompt': 'a', 'chosen': ' b', 'rejected': ' c'}
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("chosen and rejected must both be texts or both be messages")
    if prompt is not None and not prompt:
        raise UserError("the prompt is empty")
    if isinstance(chosen, str):
        shared = shared_prompt_length(chosen, rejected) if prompt is None else 0
    elif isinstance(prompt, list) and chosen[: len(prompt)] != prompt:
        shared = 0
    elif isinstance(prompt, str) and chosen[0]["role"] == "assistant":
        prompt, shared = [{"role": "user", "content": prompt}], 0
    else:
        # the last message is a response, even if one conversation is the start of the other
        shared = common_prefix_length(chosen[:-1], rejected[:-1])
        prompt = None
    return {
        "prompt": chosen[:shared] if prompt is None else prompt,
        "chosen": chosen[shared:],
        "rejected": rejected[shared:],
    }


def shared_prompt_length(chosen: str, rejected: str) -> int:
    """Return the number of characters of the prompt with which both texts begin.

    A prompt of HH-RLHF ends with the last shared `Assistant:`. Any other prompt ends before the
    first word that differs.

    Example:
        >>> shared_prompt_length("so late", "so long")
        2
    """
    shared = common_prefix_length(chosen, rejected)
    turn = chosen.rfind(HH_TURN, 0, shared)
    if turn >= 0:
        return turn + len(HH_TURN)
    words = [found.start() for found in re.finditer(r"\s+\S", chosen[: shared + 1])]
    return words[-1] if words else 0


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of equal characters or messages at the start of both sequences.

    Example:
        >>> common_prefix_length("blue", "black")
        2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def extract_prompt(row: Row) -> str | list[Message]:
    """Return the prompt of a canonical row, or its messages before the last assistant turn.

    Example:
        >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        >>> extract_prompt({"messages": talk})
        [{'role': 'user', 'content': 'hi'}]
    """
    prompt: str | list[Message]
    if "prompt" in row:
        prompt = row["prompt"]
    elif "messages" in row:
        conversation = row["messages"]
        assistant_turns = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
        prompt = conversation[: assistant_turns[-1]] if assistant_turns else conversation
    else:
        raise missing_columns_error(
            row, "prompt, messages, conversations, instruction, or chosen and rejected"
        )
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError("the prompt is empty")
    return prompt


def missing_columns_error(row: Row, wanted: str) -> UserError:
    """Return an error with the columns that were found and those that are needed.

    Args:
        row: Row that lacks columns.
        wanted: Names of the columns that are needed.

    Example:
        >>> print(missing_columns_error({"question": "a"}, "prompt"))
        the row has the columns question and needs prompt. Set --data.rename_columns.
    """
    return UserError(
        f"the row has the columns {', '.join(row)} and needs {wanted}. Set --data.rename_columns."
    )


def finite_number(value: Any, name: str) -> float:
    """Return the number of a cell, which may be text.

    Args:
        value: Cell of a row.
        name: Column of the cell, for the error message.

    Example:
        >>> finite_number("1.5", "rating")
        1.5
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, found '{value}'")
    return number

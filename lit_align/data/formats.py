"""One vocabulary for all forms of rows: prompt, completion, chosen, rejected, messages, text.

These are TRL's columns, plain or conversational. ShareGPT conversations, alpaca instructions and
pairs that hold their prompt inside become them here; a data set's other columns stay untouched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lit_align.data.sources import Row
from lit_align.data.text import Message
from lit_align.errors import UserError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
HH_TURN = "\n\nAssistant:"


def add_renamed_columns(row: Row, columns: dict[str, str]) -> Row:
    """The row with more names: {question: prompt} reads the question as prompt, too."""
    for old in columns:
        if old not in row:
            raise UserError(f"there is no column '{old}' to rename, only {', '.join(row)}")
    return {**row, **{new: row[old] for old, new in columns.items()}}


def canonical_row(row: Row) -> Row:
    """The row with its prompt, completion, chosen, rejected or messages where it has them."""
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
    """Messages with role and content, also from ShareGPT's from and value, and from one turn."""
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
            raise UserError(f"a message needs role and content (or from and value), not {turn}")
        messages.append(turn)
    return messages


def convert_alpaca(row: Row) -> Row:
    """Prompt and answers of instruction, input and output, with system and history if present."""
    parts = [row["instruction"], row.get("input", "")]
    prompt = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history", []):
        prompt += [{"role": "user", "content": question}]
        prompt += [{"role": "assistant", "content": answer}]
    prompt += [{"role": "user", "content": "\n".join(part for part in parts if part)}]
    found: Row = {"prompt": prompt}
    for old, new in {"output": "completion", "chosen": "chosen", "rejected": "rejected"}.items():
        if isinstance(row.get(old), str):
            found[new] = [{"role": "assistant", "content": row[old]}]
    return found


def split_preference(row: Row) -> Row:
    """Prompt and the two answers alone, also where the prompt stands inside both of them."""
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
        shared = common_prefix_length(chosen[:-1], rejected[:-1])
        prompt = None
    return {
        "prompt": chosen[:shared] if prompt is None else prompt,
        "chosen": chosen[shared:],
        "rejected": rejected[shared:],
    }


def shared_prompt_length(chosen: str, rejected: str) -> int:
    """Characters of the prompt that two texts begin with.

    HH-RLHF's prompt ends with the last shared `Assistant:`; any other before the first word that
    differs.
    """
    shared = common_prefix_length(chosen, rejected)
    turn = chosen.rfind(HH_TURN, 0, shared)
    if turn >= 0:
        return turn + len(HH_TURN)
    words = [found.start() for found in re.finditer(r"\s+\S", chosen[: shared + 1])]
    return words[-1] if words else 0


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first characters or messages are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def extract_prompt(row: Row) -> str | list[Message]:
    """What a canonical row asks: its prompt, or its messages before the last answer."""
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


def missing_columns_error(row: Row, wanted: str) -> ValueError:
    """An error that says which columns there are and which are wanted."""
    return ValueError(
        f"it has the columns {', '.join(row)}; wanted: {wanted} (data.rename_columns gives the "
        "names that are wanted)"
    )

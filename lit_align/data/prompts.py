"""Prompts for online algorithms."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lit_align.batches import Answer, Batch, Experience
from lit_align.data.base import TextData
from lit_align.data.formats import canonical, missing, prompt_of
from lit_align.data.padding import pad_left
from lit_align.data.sources import Row
from lit_align.data.text import encode_prompt


class PromptData(TextData):
    """Prompts, left-padded, with all columns of the data set for the rewards.

    Reads `prompt`, or what `messages`, `conversations`, `instruction` or a preference pair ask,
    or the beginning of a `text`. Rows with the same prompt are set aside only together.

    Args:
        first_words: Words of a `text` that are its prompt, where white space ends a word. Texts
            without a further word are dropped. 0: texts give no prompts.
        max_prompt_tokens: Longest prompt, in tokens.
        truncate_prompts: Whether a longer prompt keeps its last tokens; else its row is dropped.
        **kwargs: Those of TextData.
    """

    def __init__(
        self,
        *args: Any,
        first_words: int = 0,
        max_prompt_tokens: int = 512,
        truncate_prompts: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.first_words = first_words
        self.max_prompt_tokens = max_prompt_tokens
        self.truncate_prompts = truncate_prompts

    def encode(self, row: Row) -> Prompt | None:
        """Token ids of a prompt, and the row's columns."""
        prompt = self.beginning(row) if self.first_words else prompt_of(canonical(row))
        if prompt is None:
            self.dropped[f"texts of at most first_words {self.first_words}"] += 1
            return None
        ids = encode_prompt(self.tokenizer, prompt)
        if len(ids) > self.max_prompt_tokens:
            limit = f"prompts of more than max_prompt_tokens {self.max_prompt_tokens}"
            if not self.truncate_prompts:
                self.dropped[limit] += 1
                return None
            self.cut[limit] += 1
            ids = ids[-self.max_prompt_tokens :]
        return Prompt(array("i", ids), {**row, "prompt": prompt})

    def beginning(self, row: Row) -> str | None:
        """The first words of a text as they stand there; None where nothing follows them."""
        if not isinstance(row.get("text"), str):
            raise missing(row, "text, of which data.first_words makes prompts")
        found = re.match(rf"\s*\S+(?:\s+\S+){{{self.first_words - 1}}}(?=\s+\S)", row["text"])
        return found[0].lstrip() if found else None

    def unit(self, example: Prompt) -> bytes:
        """The prompt's tokens."""
        return example.ids.tobytes()

    def collate(self) -> Callable[..., Batch]:
        """Makes an Experience of prompts."""
        return partial(experience, self.tokenizer.pad_token_id)


class Prompt(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt.
        columns: All columns of its row.
        answers: What rows of AnsweredPrompts answer.
    """

    ids: array[int]
    columns: Row
    answers: tuple[Answer, ...] = ()


def experience(pad: int, examples: list[Prompt], **marks: Any) -> Experience:
    """Prompts of one batch, left-padded; a column that a row lacks is None there."""
    tokens, mask, lengths = pad_left([example.ids for example in examples], pad)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return Experience(columns, prompts=tokens, prompt_mask=mask, prompt_lengths=lengths, **marks)

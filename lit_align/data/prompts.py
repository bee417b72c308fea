"""Prompts for online algorithms."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lit_align.batches import Batch, Experience
from lit_align.data.forms import canonical, prompt_of
from lit_align.data.loading import TextData
from lit_align.data.padding import pad_left
from lit_align.data.rows import Row
from lit_align.data.text import encode_prompt


class PromptData(TextData):
    """Prompts, left-padded, with all columns of the data set for the rewards.

    Reads `prompt`, or what `messages`, `conversations`, `instruction` or a preference pair ask.

    Args:
        max_prompt_tokens: Longest prompt, in tokens.
        truncate_prompts: Whether a longer prompt keeps its last tokens; else its row is dropped.
        **kwargs: Those of TextData.
    """

    def __init__(
        self,
        *args: Any,
        max_prompt_tokens: int = 512,
        truncate_prompts: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.max_prompt_tokens = max_prompt_tokens
        self.truncate_prompts = truncate_prompts

    def encode(self, row: Row) -> Prompt | None:
        """Token ids of a prompt, and the row's columns."""
        prompt = prompt_of(canonical(row))
        ids = encode_prompt(self.tokenizer, prompt)
        if len(ids) > self.max_prompt_tokens:
            limit = f"prompts of more than max_prompt_tokens {self.max_prompt_tokens}"
            if not self.truncate_prompts:
                self.dropped[limit] += 1
                return None
            self.cut[limit] += 1
            ids = ids[-self.max_prompt_tokens :]
        return Prompt(array("i", ids), {**row, "prompt": prompt})

    def collate(self) -> Callable[..., Batch]:
        """Makes an Experience of prompts."""
        return partial(experience, self.tokenizer.pad_token_id)


class Prompt(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt.
        columns: All columns of its row.
    """

    ids: array[int]
    columns: Row


def experience(pad: int, examples: list[Prompt], **marks: Any) -> Experience:
    """Prompts of one batch, left-padded; a column that a row lacks is None there."""
    tokens, mask, lengths = pad_left([example.ids for example in examples], pad)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return Experience(columns, prompts=tokens, prompt_mask=mask, prompt_lengths=lengths, **marks)

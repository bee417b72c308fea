"""Prompts for online algorithms."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lit_align.batches import Batch, Experience, OfflineResponse
from lit_align.data.base import TextDataModule
from lit_align.data.formats import canonical_row, extract_prompt, missing_columns_error
from lit_align.data.padding import pad_left
from lit_align.data.sources import Row
from lit_align.data.text import encode_prompt


class PromptData(TextDataModule):
    """Prompts, left-padded, with all columns of the data set for the rewards.

    Reads `prompt`, or what `messages`, `conversations`, `instruction` or a preference pair ask,
    or the beginning of a `text`. Rows with the same prompt are set aside only together.

    Args:
        prompt_words: Words of a `text` that are its prompt, where white space ends a word. Texts
            without a further word are dropped. 0: texts give no prompts.
        max_prompt_tokens: Longest prompt, in tokens.
        truncate_prompts: Whether a longer prompt keeps its last tokens; else its row is dropped.
        **kwargs: Those of TextDataModule.
    """

    def __init__(
        self,
        *args: Any,
        prompt_words: int = 0,
        max_prompt_tokens: int = 512,
        truncate_prompts: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.prompt_words = prompt_words
        self.max_prompt_tokens = max_prompt_tokens
        self.truncate_prompts = truncate_prompts

    def encode(self, row: Row) -> EncodedPrompt | None:
        """Token ids of a prompt, and the row's columns."""
        prompt = (
            self.leading_words(row) if self.prompt_words else extract_prompt(canonical_row(row))
        )
        if prompt is None:
            self.dropped[f"texts of at most prompt_words {self.prompt_words}"] += 1
            return None
        ids = encode_prompt(self.tokenizer, prompt)
        if len(ids) > self.max_prompt_tokens:
            limit = f"prompts of more than max_prompt_tokens {self.max_prompt_tokens}"
            if not self.truncate_prompts:
                self.dropped[limit] += 1
                return None
            self.truncated[limit] += 1
            ids = ids[-self.max_prompt_tokens :]
        return EncodedPrompt(array("i", ids), {**row, "prompt": prompt})

    def leading_words(self, row: Row) -> str | None:
        """The first words of a text as they stand there; None where nothing follows them."""
        if not isinstance(row.get("text"), str):
            raise missing_columns_error(row, "text, of which data.prompt_words makes prompts")
        match = re.match(rf"\s*\S+(?:\s+\S+){{{self.prompt_words - 1}}}(?=\s+\S)", row["text"])
        return match[0].lstrip() if match else None

    def group_key(self, example: EncodedPrompt) -> bytes:
        """The prompt's tokens."""
        return example.ids.tobytes()

    def collate_fn(self) -> Callable[..., Batch]:
        """Makes an Experience of prompts."""
        return partial(collate_prompts, self.tokenizer.pad_token_id)


class EncodedPrompt(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt.
        columns: All columns of its row.
        offline_responses: What rows of OfflineResponseData answer.
    """

    ids: array[int]
    columns: Row
    offline_responses: tuple[OfflineResponse, ...] = ()


def collate_prompts(pad: int, examples: list[EncodedPrompt], **flags: Any) -> Experience:
    """Prompts of one batch, left-padded; a column that a row lacks is None there."""
    tokens, mask, lengths = pad_left([example.ids for example in examples], pad)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return Experience(columns, prompts=tokens, prompt_mask=mask, prompt_lengths=lengths, **flags)

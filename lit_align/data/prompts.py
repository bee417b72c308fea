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
    """Left-padded prompts, with all columns of the data set for the rewards.

    Reads `prompt`, or takes the prompt of `messages`, `conversations`, `instruction` or a
    preference pair, or the first words of `text`. Rows with the same prompt are held out together.

    Args:
        prompt_words: Number of leading words of `text` that are its prompt, separated by white
            space. Texts without a further word are dropped. 0 reads the other columns.
        max_prompt_tokens: Most tokens of a prompt.
        truncate_prompts: Cut a longer prompt to its last tokens. Otherwise its row is dropped.
        **kwargs: Arguments of TextDataModule.

    Example:
        >>> data = PromptData("toy", tokenizer="toy", prompt_words=2)
        >>> data.encode({"text": "the plot is thin"}).columns["prompt"]
        'the plot'
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
        """Return the token ids of a prompt and the columns of its row, or None if it is dropped."""
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
        """Return the first `prompt_words` words of a text, or None if no word follows them.

        Example:
            >>> PromptData("toy", prompt_words=2).leading_words({"text": "once upon a time"})
            'once upon'
        """
        if not isinstance(row.get("text"), str):
            raise missing_columns_error(row, "text, because data.prompt_words is set")
        match = re.match(rf"\s*\S+(?:\s+\S+){{{self.prompt_words - 1}}}(?=\s+\S)", row["text"])
        return match[0].lstrip() if match else None

    def group_key(self, example: EncodedPrompt) -> bytes:
        """Return the token ids of the prompt as bytes."""
        return example.ids.tobytes()

    def collate_fn(self) -> Callable[..., Batch]:
        """Return a function that makes an Experience of prompts."""
        return partial(collate_prompts, self.tokenizer.pad_token_id)


class EncodedPrompt(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt.
        columns: All columns of its row.
        offline_responses: Offline responses of the prompt, from OfflineResponseData.
    """

    ids: array[int]
    columns: Row
    offline_responses: tuple[OfflineResponse, ...] = ()


def collate_prompts(pad: int, examples: list[EncodedPrompt], **flags: Any) -> Experience:
    """Return a batch of B left-padded prompts [B, P]. A column that a row lacks is None there.

    Args:
        pad: Token id of the padding.
        examples: B encoded prompts.
        **flags: Other fields of the batch.

    Example:
        >>> first = EncodedPrompt(array("i", [5]), {"level": 1})
        >>> batch = collate_prompts(0, [first, EncodedPrompt(array("i", [6, 7]), {})])
        >>> batch.prompts.tolist(), batch.columns
        ([[0, 5], [6, 7]], {'level': [1, None]})
    """
    tokens, mask, lengths = pad_left([example.ids for example in examples], pad)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return Experience(columns, prompts=tokens, prompt_mask=mask, prompt_lengths=lengths, **flags)

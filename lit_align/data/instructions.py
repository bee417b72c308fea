"""Texts for supervised fine-tuning."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lit_align.batches import Batch, TextBatch
from lit_align.data.base import TextDataModule
from lit_align.data.formats import canonical_row, extract_prompt, missing_columns_error
from lit_align.data.padding import pad_right
from lit_align.data.sources import Row
from lit_align.data.text import encode_messages, encode_response, encode_text


class InstructionData(TextDataModule):
    """Whole texts, right-padded, and which of their tokens are learnt.

    Of `messages` or `conversations` the assistant turns are learnt, of `prompt` and `completion`
    (or alpaca's `instruction` and `output`) the completion, of `text` everything.

    Args:
        max_tokens: Where a text is cut, in tokens; a cut answer has no stop.
        train_on_prompt: Whether the tokens of prompts are learnt, too.
        **kwargs: Those of TextDataModule.
    """

    def __init__(
        self, *args: Any, max_tokens: int = 1024, train_on_prompt: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        self.train_on_prompt = train_on_prompt

    def encode(self, row: Row) -> EncodedText | None:
        """Token ids of a row and which are learnt."""
        ids, target_mask = self.ids_and_target_mask(canonical_row(row))
        if len(ids) > self.max_tokens:
            self.truncated[f"texts of more than max_tokens {self.max_tokens}"] += 1
            ids, target_mask = ids[: self.max_tokens], target_mask[: self.max_tokens]
        if True not in target_mask[1:]:
            self.dropped["texts of which no token would be learnt"] += 1
            return None
        return EncodedText(array("i", ids), bytes(target_mask))

    def ids_and_target_mask(self, row: Row) -> tuple[list[int], list[bool]]:
        """The three kinds of texts."""
        if "messages" in row:
            ids, target_mask = encode_messages(self.tokenizer, row["messages"])
            return ids, [True] * len(ids) if self.train_on_prompt else target_mask
        if "completion" in row:
            prompt, response = encode_response(
                self.tokenizer, extract_prompt(row), row["completion"]
            )
            target_mask = [self.train_on_prompt] * len(prompt) + [True] * len(response)
            return prompt + response, target_mask
        if "text" in row:
            ids = encode_text(self.tokenizer, row["text"])
            return ids, [True] * len(ids)
        raise missing_columns_error(
            row, "messages, conversations, prompt and completion, instruction, or text"
        )

    def collate_fn(self) -> Callable[..., Batch]:
        """Makes TextBatch."""
        return partial(collate_texts, self.tokenizer.pad_token_id)


class EncodedText(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the whole text.
        target_mask: One byte per token, 1 where it is learnt.
    """

    ids: array[int]
    target_mask: bytes


def collate_texts(pad: int, examples: list[EncodedText], **flags: Any) -> TextBatch:
    """Texts of one batch, right-padded."""
    tokens, mask, lengths = pad_right([example.ids for example in examples], pad)
    target_mask = pad_right([example.target_mask for example in examples], 0)[0].to(torch.bool)
    return TextBatch(
        tokens=tokens, token_mask=mask, target_mask=target_mask, lengths=lengths, **flags
    )

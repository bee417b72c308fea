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
    """Right-padded texts with a mask of the tokens that are trained on.

    The trained tokens are the assistant turns of `messages` or `conversations`, the completion of
    `prompt` and `completion` (or of alpaca's `instruction` and `output`), or all of `text`.

    Args:
        max_tokens: Most tokens of a text. A longer text is cut and then has no stop token.
        train_on_prompt: Train on the tokens of prompts too.
        **kwargs: Arguments of TextDataModule.

    Example:
        >>> data = InstructionData("toy", tokenizer="toy")
        >>> example = data.encode({"prompt": "review of", "completion": "the plot"})
        >>> len(example.ids), list(example.target_mask)
        (6, [0, 0, 0, 1, 1, 1])
    """

    def __init__(
        self, *args: Any, max_tokens: int = 1024, train_on_prompt: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        self.train_on_prompt = train_on_prompt

    def encode(self, row: Row) -> EncodedText | None:
        """Return the token ids of a row and their target mask; None if no token is trained on."""
        ids, target_mask = self.ids_and_target_mask(canonical_row(row))
        if len(ids) > self.max_tokens:
            self.truncated[f"texts of more than max_tokens {self.max_tokens}"] += 1
            ids, target_mask = ids[: self.max_tokens], target_mask[: self.max_tokens]
        if True not in target_mask[1:]:  # the first token has no context to be predicted from
            self.dropped["texts without a token to train on"] += 1
            return None
        return EncodedText(array("i", ids), bytes(target_mask))

    def ids_and_target_mask(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the token ids of a canonical row and which of them are trained on.

        Example:
            >>> data = InstructionData("toy", tokenizer="toy")
            >>> data.ids_and_target_mask({"text": "the plot"})[1]
            [True, True, True, True]
        """
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
        """Return a function that makes a TextBatch."""
        return partial(collate_texts, self.tokenizer.pad_token_id)


class EncodedText(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the text.
        target_mask: One byte per token, 1 if it is trained on.
    """

    ids: array[int]
    target_mask: bytes


def collate_texts(pad: int, examples: list[EncodedText], **flags: Any) -> TextBatch:
    """Return a batch of N right-padded texts: tokens and masks [N, T].

    Args:
        pad: Token id of the padding.
        examples: N encoded rows.
        **flags: Other fields of the batch.

    Example:
        >>> first, second = array("i", [5, 6]), array("i", [7])
        >>> rows = [EncodedText(first, bytes([0, 1])), EncodedText(second, bytes([1]))]
        >>> batch = collate_texts(9, rows)
        >>> batch.tokens.tolist(), batch.token_mask.tolist()
        ([[5, 6], [7, 9]], [[True, True], [True, False]])
    """
    tokens, mask, lengths = pad_right([example.ids for example in examples], pad)
    target_mask = pad_right([example.target_mask for example in examples], 0)[0].to(torch.bool)
    return TextBatch(
        tokens=tokens, token_mask=mask, target_mask=target_mask, lengths=lengths, **flags
    )

"""Texts for supervised fine-tuning."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lit_align.batches import Batch, Tokens
from lit_align.data.base import TextData
from lit_align.data.formats import canonical, missing, prompt_of
from lit_align.data.padding import pad_right
from lit_align.data.sources import Row
from lit_align.data.text import encode_answer, encode_messages, encode_text


class InstructionData(TextData):
    """Whole texts, right-padded, and which of their tokens are learnt.

    Of `messages` or `conversations` the assistant turns are learnt, of `prompt` and `completion`
    (or alpaca's `instruction` and `output`) the completion, of `text` everything.

    Args:
        max_tokens: Where a text is cut, in tokens; a cut answer has no stop.
        train_on_prompt: Whether the tokens of prompts are learnt, too.
        **kwargs: Those of TextData.
    """

    def __init__(
        self, *args: Any, max_tokens: int = 1024, train_on_prompt: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        self.train_on_prompt = train_on_prompt

    def encode(self, row: Row) -> Text | None:
        """Token ids of a row and which are learnt."""
        ids, learnt = self.ids_and_learnt(canonical(row))
        if len(ids) > self.max_tokens:
            self.cut[f"texts of more than max_tokens {self.max_tokens}"] += 1
            ids, learnt = ids[: self.max_tokens], learnt[: self.max_tokens]
        if True not in learnt[1:]:
            self.dropped["texts of which no token would be learnt"] += 1
            return None
        return Text(array("i", ids), bytes(learnt))

    def ids_and_learnt(self, row: Row) -> tuple[list[int], list[bool]]:
        """The three kinds of texts."""
        if "messages" in row:
            ids, learnt = encode_messages(self.tokenizer, row["messages"])
            return ids, [True] * len(ids) if self.train_on_prompt else learnt
        if "completion" in row:
            prompt, answer = encode_answer(self.tokenizer, prompt_of(row), row["completion"])
            learnt = [self.train_on_prompt] * len(prompt) + [True] * len(answer)
            return prompt + answer, learnt
        if "text" in row:
            ids = encode_text(self.tokenizer, row["text"])
            return ids, [True] * len(ids)
        raise missing(row, "messages, conversations, prompt and completion, instruction, or text")

    def collate(self) -> Callable[..., Batch]:
        """Makes Tokens."""
        return partial(tokens_of, self.tokenizer.pad_token_id)


class Text(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the whole text.
        learnt: One byte per token, 1 where it is learnt.
    """

    ids: array[int]
    learnt: bytes


def tokens_of(pad: int, examples: list[Text], **marks: Any) -> Tokens:
    """Texts of one batch, right-padded."""
    tokens, mask, lengths = pad_right([example.ids for example in examples], pad)
    learnt = pad_right([example.learnt for example in examples], 0)[0].to(torch.bool)
    return Tokens(tokens=tokens, token_mask=mask, loss_mask=learnt, lengths=lengths, **marks)

"""Prompts that somebody has answered: SPR learns from those answers beside its own."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from lit_align.batches import Batch, Experience, OfflineResponse
from lit_align.data.formats import canonical_row
from lit_align.data.prompts import EncodedPrompt, PromptData, collate_prompts
from lit_align.data.sources import Row, Source
from lit_align.data.text import encode_response
from lit_align.errors import UserError

RESPONSE_COLUMNS = ("completion", "score", "logprob")


class OfflineResponseData(PromptData):
    """Prompts as PromptData has them, each with all answers that rows of the data give to it.

    A row has `prompt`, `completion` and, where they are known, `score` (on the scale of the run's
    reward) and `logprob` (nats of the completion under whoever wrote it, summed over its tokens
    and its stop). Rows of one prompt become one; further columns are those of the first of them.
    """

    def encode(self, row: Row) -> EncodedPrompt | None:
        """A prompt with its row's answer; with none where the row has no completion."""
        example, row = super().encode(row), canonical_row(row)
        if example is None:
            return None
        columns = {k: value for k, value in example.columns.items() if k not in RESPONSE_COLUMNS}
        example = example._replace(columns=columns)
        if "completion" not in row:
            return example
        tokens = encode_response(self.tokenizer, columns["prompt"], row["completion"])[1]
        score, logprob = optional_number(row, "score"), optional_number(row, "logprob")
        if logprob is not None and logprob > 0:
            raise UserError(f"logprob is the log of a probability and at most 0, not {logprob:g}")
        return example._replace(
            offline_responses=(OfflineResponse(array("i", tokens), score, logprob),)
        )

    def read_source(self, source: Source) -> list[EncodedPrompt]:
        """The prompts in the order of their first rows."""
        first: dict[bytes, EncodedPrompt] = {}
        responses: dict[bytes, list[OfflineResponse]] = {}
        for example in super().read_source(source):
            group_key = self.group_key(example)
            first.setdefault(group_key, example)
            responses.setdefault(group_key, []).extend(example.offline_responses)
        return [
            example._replace(offline_responses=tuple(responses[group_key]))
            for group_key, example in first.items()
        ]

    def train_eval_split(self, source: Source) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
        """The training prompts, all of which must have an answer, and those set aside."""
        train_examples, held_out = super().train_eval_split(source)
        number = sum(not example.offline_responses for example in train_examples)
        if number:
            raise UserError(
                f"{number} of {len(train_examples)} training prompts of '{source.path}' "
                "have no completion: "
                "leave them out (data.drop_matching: {completion: '^$'}), "
                "or take the class PromptData"
            )
        return train_examples, held_out

    def collate_fn(self) -> Callable[..., Batch]:
        """Makes an Experience of prompts with their answers."""
        return partial(collate_offline, self.tokenizer.pad_token_id)


def collate_offline(pad: int, examples: list[EncodedPrompt], **flags: Any) -> Experience:
    """Prompts of one batch, and what the data answer to each."""
    responses = [list(example.offline_responses) for example in examples]
    return collate_prompts(pad, examples, offline_responses=responses, **flags)


def optional_number(row: Row, name: str) -> float | None:
    """A column's number; None where it is empty or missing."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} must be a number, found '{value}'")
    return number

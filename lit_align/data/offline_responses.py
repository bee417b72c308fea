"""Prompts that somebody has answered: SPR learns from those answers beside its own."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from lit_align.batches import Answer, Batch, Experience
from lit_align.data.formats import canonical
from lit_align.data.prompts import Prompt, PromptData, experience
from lit_align.data.sources import Row, Source
from lit_align.data.text import encode_answer

OF_THE_ANSWER = ("completion", "score", "logprob")


class AnsweredPrompts(PromptData):
    """Prompts as PromptData has them, each with all answers that rows of the data give to it.

    A row has `prompt`, `completion` and, where they are known, `score` (on the scale of the run's
    reward) and `logprob` (nats of the completion under whoever wrote it, summed over its tokens
    and its stop). Rows of one prompt become one; further columns are those of the first of them.
    """

    def encode(self, row: Row) -> Prompt | None:
        """A prompt with its row's answer; with none where the row has no completion."""
        example, row = super().encode(row), canonical(row)
        if example is None:
            return None
        columns = {k: value for k, value in example.columns.items() if k not in OF_THE_ANSWER}
        example = example._replace(columns=columns)
        if "completion" not in row:
            return example
        tokens = encode_answer(self.tokenizer, columns["prompt"], row["completion"])[1]
        score, logprob = number_of(row, "score"), number_of(row, "logprob")
        if logprob is not None and logprob > 0:
            raise ValueError(f"logprob is the log of a probability and at most 0, not {logprob:g}")
        return example._replace(answers=(Answer(array("i", tokens), score, logprob),))

    def read(self, source: Source) -> list[Prompt]:
        """The prompts in the order of their first rows."""
        first: dict[bytes, Prompt] = {}
        answers: dict[bytes, list[Answer]] = {}
        for example in super().read(source):
            unit = self.unit(example)
            first.setdefault(unit, example)
            answers.setdefault(unit, []).extend(example.answers)
        return [example._replace(answers=tuple(answers[unit])) for unit, example in first.items()]

    def halves(self, source: Source) -> tuple[list[Prompt], list[Prompt]]:
        """The training prompts, all of which must have an answer, and those set aside."""
        kept, aside = super().halves(source)
        number = sum(not example.answers for example in kept)
        if number:
            raise ValueError(
                f"{number} of {len(kept)} training prompts of '{source.path}' have no completion: "
                "leave them out (data.drop: {completion: '^$'}), or take the class PromptData"
            )
        return kept, aside

    def collate(self) -> Callable[..., Batch]:
        """Makes an Experience of prompts with their answers."""
        return partial(answered, self.tokenizer.pad_token_id)


def answered(pad: int, examples: list[Prompt], **marks: Any) -> Experience:
    """Prompts of one batch, and what the data answer to each."""
    answers = [list(example.answers) for example in examples]
    return experience(pad, examples, answers=answers, **marks)


def number_of(row: Row, name: str) -> float | None:
    """A column's number; None where it is empty or missing."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, found '{value}'")
    return number

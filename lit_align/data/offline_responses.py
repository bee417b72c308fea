"""Prompts with offline responses, from which SPR also learns."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from lit_align.batches import Batch, Experience, OfflineResponse
from lit_align.data.formats import canonical_row, finite_number
from lit_align.data.prompts import EncodedPrompt, PromptData, collate_prompts
from lit_align.data.sources import Row, Source
from lit_align.data.text import encode_response
from lit_align.errors import UserError

RESPONSE_COLUMNS = ("completion", "score", "logprob")


class OfflineResponseData(PromptData):
    """Prompts of PromptData, each with all offline responses that the rows contain.

    A row has `prompt`, `completion` and two optional columns. `score` is on the scale of the run's
    reward. `logprob` is the log-prob of the completion, in nats summed over its tokens and its
    stop, under the policy that generated it. Rows of one prompt become one. Its other columns are
    those of the first row.

    Example:
        >>> data = OfflineResponseData("toy", tokenizer="toy")
        >>> example = data.encode({"prompt": "review of", "completion": "the plot", "score": 1.5})
        >>> [(len(r.tokens), r.score, r.logprob) for r in example.offline_responses]
        [(3, 1.5, None)]
    """

    def encode(self, row: Row) -> EncodedPrompt | None:
        """Return a prompt with the offline response of its row, or without if there is none."""
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
            raise UserError(f"logprob must be at most 0, found {logprob:g}")
        return example._replace(
            offline_responses=(OfflineResponse(array("i", tokens), score, logprob),)
        )

    def read_source(self, source: Source) -> list[EncodedPrompt]:
        """Return one example per prompt, in the order of the prompts' first rows."""
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
        """Return training prompts, which must have offline responses, and held-out prompts."""
        train_examples, held_out = super().train_eval_split(source)
        number = sum(not example.offline_responses for example in train_examples)
        if number:
            raise UserError(
                f"{number} of {len(train_examples)} training prompts of '{source.path}' "
                "have no completion. Set --data.drop_matching \"{completion: '^$'}\" or use "
                "--data PromptData."
            )
        return train_examples, held_out

    def collate_fn(self) -> Callable[..., Batch]:
        """Return a function that makes an Experience of prompts with offline responses."""
        return partial(collate_offline, self.tokenizer.pad_token_id)


def collate_offline(pad: int, examples: list[EncodedPrompt], **flags: Any) -> Experience:
    """Return a batch of B left-padded prompts [B, P] with a list of offline responses each.

    Args:
        pad: Token id of the padding.
        examples: B encoded prompts.
        **flags: Other fields of the batch.

    Example:
        >>> response = OfflineResponse([7, 2], 1.0, None)
        >>> batch = collate_offline(0, [EncodedPrompt(array("i", [5]), {}, (response,))])
        >>> batch.offline_responses[0][0].tokens
        [7, 2]
    """
    responses = [list(example.offline_responses) for example in examples]
    return collate_prompts(pad, examples, offline_responses=responses, **flags)


def optional_number(row: Row, name: str) -> float | None:
    """Return the number of a column, or None if the cell is empty or missing.

    Example:
        >>> optional_number({"score": "2"}, "score"), optional_number({"score": ""}, "score")
        (2.0, None)
    """
    value = row.get(name)
    return None if value is None or value == "" else finite_number(value, name)

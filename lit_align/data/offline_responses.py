"""Offline responses: prompts that come with responses in the data set, and rows in a rollout."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lit_align.batches import Batch, Experience, OfflineResponse
from lit_align.data.formats import canonical_row, finite_number
from lit_align.data.padding import pad_right
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
        """Return a prompt with the offline response of its row, if the row has a completion."""
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


def draw_offline(
    batch: Experience, number: int, seed_key: str, rank: int, world: int
) -> list[OfflineResponse]:
    """Return B * number random offline responses, those of a prompt next to each other.

    A response is repeated only if its prompt has fewer than `number`. The choice depends on the
    seed, `seed_key` and the prompt's position in the batch of all ranks, in the same way as the
    sampling noise.

    Args:
        batch: B prompts of this rank.
        number: Offline responses per prompt.
        seed_key: Text that selects the choice, such as "train 3".
        rank: Index of this rank, whose prompts are rank, rank + world, ... of all.
        world: Number of ranks.

    Example:
        >>> responses = [OfflineResponse([5, 2], None, None), OfflineResponse([6, 2], None, None)]
        >>> batch = Experience(prompts=torch.zeros(1, 1), offline_responses=[responses])
        >>> drawn = draw_offline(batch, 2, "train 0", rank=0, world=1)
        >>> sorted(response.tokens for response in drawn)
        [[5, 2], [6, 2]]
    """
    if not number:
        return []
    if "offline_responses" not in batch.fields():
        raise UserError(
            "num_offline_samples needs offline responses in the data. Use --data "
            "OfflineResponseData with rows of prompt and completion, or set "
            "--model.num_offline_samples 0."
        )
    found: list[OfflineResponse] = []
    for row, responses in enumerate(batch.offline_responses):
        index = row * world + rank
        # Part of the seed. Changing this text changes every run with offline responses.
        source = random.Random(f"{torch.initial_seed()} {seed_key} stored {index}")
        found += sample_with_reuse(responses, number, source)
    return found


def sample_with_reuse(
    responses: Sequence[OfflineResponse], number: int, source: random.Random
) -> list[OfflineResponse]:
    """Return `number` responses in random order. Each is used once before any is used again.

    Example:
        >>> responses = [OfflineResponse([5, 2], None, None), OfflineResponse([6, 2], None, None)]
        >>> len(sample_with_reuse(responses, 5, random.Random(0)))
        5
    """
    num_rounds, rest = divmod(number, len(responses))
    rounds = [len(responses)] * num_rounds + [rest]
    return [response for size in rounds for response in source.sample(responses, size)]


def offline_rows(
    batch: Experience,
    responses: Sequence[OfflineResponse],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad: int,
) -> Experience:
    """Return offline responses as rows, with the fields that sampled rows have.

    Args:
        batch: B prompts.
        responses: Offline responses, the same number for each prompt, in prompt order.
        max_new_tokens: R, most tokens of a response.
        stop_ids: Token ids that end a response.
        pad: Token id of the padding.

    Example:
        >>> batch = Experience({}, prompts=torch.tensor([[5]]))
        >>> rows = offline_rows(batch, [OfflineResponse([6, 2], 1.0, None)], 3, [2], pad=0)
        >>> rows.responses.tolist(), rows.is_offline
        ([[6, 2, 0]], [True])
    """
    number = len(responses) // len(batch)
    rows = batch.repeat_interleave(number)
    cut = [truncate_as_sampled(response, max_new_tokens, stop_ids) for response in responses]
    padded = pad_right([response.tokens for response in cut], pad, max_new_tokens)[0]
    rows.responses = padded.to(batch.prompts.device, non_blocking=True)
    rows.sampling_logprobs = torch.zeros(rows.responses.shape, device=batch.prompts.device)
    rows.group = [row for row in range(len(batch)) for _ in range(number)]
    rows.is_greedy, rows.is_offline = [False] * len(rows), [True] * len(rows)
    rows.offline_scores = [response.score for response in cut]
    rows.offline_logprobs = [response.logprob for response in cut]
    return rows


def truncate_as_sampled(
    response: OfflineResponse, max_new_tokens: int, stop_ids: Sequence[int]
) -> OfflineResponse:
    """Return an offline response up to its first stop, and at most `max_new_tokens` tokens of it.

    A cut response loses its score and its log-prob, which belong to the complete one.

    Example:
        >>> truncate_as_sampled(OfflineResponse([5, 6, 2], 1.0, -3.0), 2, [2])
        OfflineResponse(tokens=[5, 6], score=None, logprob=None)
    """
    ends = [index + 1 for index, token in enumerate(response.tokens) if token in stop_ids]
    length = min([max_new_tokens, len(response.tokens), *ends])
    is_complete = length == len(response.tokens)
    return response if is_complete else OfflineResponse(response.tokens[:length], None, None)

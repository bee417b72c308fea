"""Answers that came with the data, as rows of a rollout."""

import random
from collections.abc import Sequence

import torch

from lit_align.batches import Answer, Experience


def drawn(batch: Experience, number: int, moment: str, rank: int, world: int) -> list[Answer]:
    """[B * number] answers, a prompt's side by side: each once while there are enough.

    Which ones depends on the seed, the moment and the prompt's place in the batch of all ranks, as
    a sample's noise does.

    Args:
        batch: B prompts of this rank, which holds each `world`-th of them all.
        number: Answers per prompt.
        moment: What is drawn for.
        rank: This one.
        world: Number of ranks.
    """
    if not number:
        return []
    if "answers" not in batch.fields():
        raise ValueError(
            "num_stored asks for answers that come with the data: give `data` the class "
            "AnsweredPrompts and rows with prompt and completion, or set num_stored to 0."
        )
    found: list[Answer] = []
    for row, answers in enumerate(batch.answers):
        place = row * world + rank
        source = random.Random(f"{torch.initial_seed()} {moment} stored {place}")
        found += several(answers, number, source)
    return found


def several(answers: Sequence[Answer], number: int, source: random.Random) -> list[Answer]:
    """So many answers in random order, all of them before any comes again."""
    again, rest = divmod(number, len(answers))
    rounds = [len(answers)] * again + [rest]
    return [answer for size in rounds for answer in source.sample(answers, size)]


def stored_rows(
    batch: Experience, answers: Sequence[Answer], room: int, stops: Sequence[int], pad: int
) -> Experience:
    """The answers as rows beside sampled ones.

    Args:
        batch: B prompts.
        answers: [B * number], a prompt's side by side.
        room: R, tokens after which an answer is cut.
        stops: Token ids that end an answer.
        pad: Token id that stands behind the end.
    """
    number = len(answers) // len(batch)
    rows = batch.repeat(number)
    said = [as_sampled(answer, room, stops) for answer in answers]
    padded = [[*answer.tokens, *[pad] * (room - len(answer.tokens))] for answer in said]
    rows.responses = torch.tensor(padded).to(batch.prompts.device, non_blocking=True)
    rows.sampling_logprobs = torch.zeros(rows.responses.shape, device=batch.prompts.device)
    rows.group = [row for row in range(len(batch)) for _ in range(number)]
    rows.greedy, rows.stored = [False] * len(rows), [True] * len(rows)
    rows.stored_scores = [answer.score for answer in said]
    rows.stored_logprobs = [answer.logprob for answer in said]
    return rows


def as_sampled(answer: Answer, room: int, stops: Sequence[int]) -> Answer:
    """The answer as far as a policy would have got: to its first stop, or to the end of the room.

    Score and log-prob of a whole answer say nothing about a part of it.
    """
    ends = [place + 1 for place, token in enumerate(answer.tokens) if token in stops]
    length = min([room, len(answer.tokens), *ends])
    whole = length == len(answer.tokens)
    return answer if whole else Answer(answer.tokens[:length], None, None)

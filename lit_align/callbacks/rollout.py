"""Responses of a rollout: sampled, decoded greedily, or drawn from the data set."""

import random
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Answer, Experience
from lit_align.errors import UserError
from lit_align.functional.masks import through_first
from lit_align.models.generation.decode import Sampling


class Rollout(Callback):
    """Answers the prompts of each batch with the policy as it is now.

    Training samples what the algorithm asks for, and adds answers of the data set where it asks
    for those; validation and test decode greedily. A sample depends on the seed, the iteration and
    the prompt's place in the batch of all ranks, so it is the same for any number of ranks and
    after any resume.

    Args:
        max_new_tokens: R, tokens after which an answer is cut.
        top_p: Share of the probability that may be sampled. Below 1 the samples are not the
            policy's own, and its gradient is biased (papers' note on ReMax, pitfall 1).
        top_k: Likeliest tokens that may be sampled, 0 for all.
        predict_greedily: `predict` takes the likeliest tokens instead of sampling.
        predict_samples: Responses that `predict` samples per prompt. Different models get the same
            noise. Must be 1 with `predict_greedily`.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        predict_greedily: bool = False,
        predict_samples: int = 1,
    ):
        if max_new_tokens < 1 or not 0 < top_p <= 1 or top_k < 0:
            raise ValueError(
                f"Rollout needs max_new_tokens >= 1, 0 < top_p <= 1 and top_k >= 0, found "
                f"{max_new_tokens}, {top_p} and {top_k}."
            )
        if predict_samples < 1 or (predict_greedily and predict_samples > 1):
            raise UserError(
                f"predict_samples must be at least 1, and 1 with predict_greedily, found "
                f"{predict_samples}. Set --rollout.predict_samples."
            )
        self.max_new_tokens, self.sampling = max_new_tokens, Sampling(top_k, top_p)
        self.predict_greedily, self.predict_samples = predict_greedily, predict_samples

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Refuses algorithms that learn from given answers."""
        if not isinstance(algorithm, OnlineAlgorithm):
            raise ValueError(
                f"{type(algorithm).__name__} learns from given answers: leave out `rollout`."
            )

    def on_train_batch_start(
        self, trainer: Trainer, algorithm: OnlineAlgorithm, batch: Experience, batch_idx: int
    ) -> None:
        """Samples, decodes greedily and adds stored answers, as the algorithm asks for it."""
        samples, greedy = algorithm.num_samples, int(algorithm.greedy_baseline)
        moment = f"train {algorithm.iteration}"
        given = drawn(batch, algorithm.num_stored, moment, trainer.global_rank, trainer.world_size)
        with algorithm.phase("rollout"):
            self.answer(trainer, algorithm, batch, samples, greedy, moment, given)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One greedy answer per prompt."""
        self.answer(trainer, algorithm, batch, 0, 1, f"evaluate {batch_idx}")

    on_test_batch_start = on_validation_batch_start

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate `predict_samples` responses per prompt, or a greedy one."""
        greedy = int(self.predict_greedily)
        samples = 0 if greedy else self.predict_samples
        self.answer(trainer, algorithm, batch, samples, greedy, f"predict {batch_idx}")

    @torch.no_grad()
    def answer(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        samples: int,
        greedy: int,
        moment: str,
        given: Sequence[Answer] = (),
    ) -> None:
        """Turns B prompts into B * samples sampled rows, behind them B * greedy, then the given."""
        prompts = list(range(len(batch)))
        groups = [row for row in prompts for _ in range(samples)] + prompts * greedy
        answered = batch.rows(groups)
        answered.group = groups
        answered.greedy = [row >= len(batch) * samples for row in range(len(groups))]
        answered.stored = [False] * len(groups)
        answered.stored_scores = answered.stored_logprobs = [None] * len(groups)
        uniform = self.noise(trainer, len(batch), samples, moment).to(algorithm.device)
        spare = uniform.new_zeros(len(batch) * greedy, self.max_new_tokens)
        stops, pad = self.stops(trainer, algorithm), trainer.datamodule.tokenizer.pad_token_id
        with trainer.precision_plugin.forward_context(), algorithm.policy.gathered() as policy:
            answered.responses, answered.sampling_logprobs = policy.respond(
                answered,
                torch.cat([uniform, spare]),
                answered.greedy,
                stops,
                pad,
                self.sampling,
            )
        if given:
            answered = answered.join(stored_rows(batch, given, self.max_new_tokens, stops, pad))
        self.measure(trainer, answered, stops)
        batch.become(answered)
        algorithm.make_room()

    def noise(self, trainer: Trainer, num_prompts: int, samples: int, moment: str) -> Tensor:
        """[B * samples, R] uniform numbers: this rank's part of those of all ranks."""
        seed = random.Random(f"{torch.initial_seed()} {moment}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, trainer.world_size, samples, self.max_new_tokens)
        return torch.rand(shape, generator=generator)[:, trainer.global_rank].flatten(0, 1)

    def measure(self, trainer: Trainer, batch: Experience, stops: list[int]) -> None:
        """Writes masks, lengths and texts: the one moment that reads the tokens on the host."""
        ends = torch.tensor(stops, device=batch.responses.device)
        batch.response_mask = through_first(batch.responses, stops)
        stopped = (torch.isin(batch.responses, ends) & batch.response_mask).any(-1)
        batch.response_lengths = batch.response_mask.sum(-1).tolist()
        batch.truncated = (~stopped).tolist()
        batch.columns["completion"] = [
            self.text(trainer, tokens[: length if cut else length - 1], prompt)
            for tokens, length, cut, prompt in zip(
                batch.responses.tolist(),
                batch.response_lengths,
                batch.truncated,
                batch.columns["prompt"],
                strict=True,
            )
        ]

    def text(self, trainer: Trainer, tokens: list[int], prompt: object) -> object:
        """The answer in the form of its prompt: text, or a list with one message."""
        text = trainer.datamodule.decode(tokens)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def stops(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> list[int]:
        """Token ids that end an answer: the policy's, the tokenizer's and the template's."""
        return sorted({*algorithm.policy.stop_ids, *trainer.datamodule.stop_ids})


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

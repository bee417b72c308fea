"""Responses of a rollout: sampled, decoded greedily, or drawn from the data set."""

import random
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience, OfflineResponse
from lit_align.errors import UserError
from lit_align.functional.masks import through_first
from lit_align.models.generation.decode import SamplingParams


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
        predict_greedy: `predict` takes the likeliest tokens instead of sampling.
        predict_samples: Responses per prompt in `predict`. All models get the same sampling noise.
            Must be 1 with `predict_greedy`.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        predict_greedy: bool = False,
        predict_samples: int = 1,
    ):
        if max_new_tokens < 1 or not 0 < top_p <= 1 or top_k < 0:
            raise UserError(
                f"Rollout needs max_new_tokens >= 1, 0 < top_p <= 1 and top_k >= 0, found "
                f"{max_new_tokens}, {top_p} and {top_k}."
            )
        if predict_samples < 1 or (predict_greedy and predict_samples > 1):
            raise UserError(
                f"predict_samples must be at least 1, and 1 with predict_greedy, found "
                f"{predict_samples}. Set --rollout.predict_samples."
            )
        self.max_new_tokens, self.sampling = max_new_tokens, SamplingParams(top_k, top_p)
        self.predict_greedy, self.predict_samples = predict_greedy, predict_samples

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Refuses algorithms that learn from given answers."""
        if not isinstance(algorithm, OnlineAlgorithm):
            raise UserError(
                f"{type(algorithm).__name__} learns from given answers: leave out `rollout`."
            )

    def on_train_batch_start(
        self, trainer: Trainer, algorithm: OnlineAlgorithm, batch: Experience, batch_idx: int
    ) -> None:
        """Samples, decodes greedily and adds stored answers, as the algorithm asks for it."""
        num_samples, num_greedy = algorithm.num_samples, int(algorithm.uses_greedy_baseline)
        seed_key = f"train {algorithm.iteration}"
        offline_responses = draw_offline(
            batch, algorithm.num_offline_samples, seed_key, trainer.global_rank, trainer.world_size
        )
        with algorithm.phase("rollout"):
            self.generate_responses(
                trainer, algorithm, batch, num_samples, num_greedy, seed_key, offline_responses
            )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One greedy answer per prompt."""
        self.generate_responses(trainer, algorithm, batch, 0, 1, f"evaluate {batch_idx}")

    on_test_batch_start = on_validation_batch_start

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate `predict_samples` responses per prompt, or a num_greedy one."""
        num_greedy = int(self.predict_greedy)
        num_samples = 0 if num_greedy else self.predict_samples
        self.generate_responses(
            trainer, algorithm, batch, num_samples, num_greedy, f"predict {batch_idx}"
        )

    @torch.no_grad()
    def generate_responses(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        num_samples: int,
        num_greedy: int,
        seed_key: str,
        offline_responses: Sequence[OfflineResponse] = (),
    ) -> None:
        """Turns B prompts into B * num_samples rows, then B * num_greedy, then offline ones."""
        prompts = list(range(len(batch)))
        groups = [row for row in prompts for _ in range(num_samples)] + prompts * num_greedy
        rollout = batch.rows(groups)
        rollout.group = groups
        rollout.is_greedy = [row >= len(batch) * num_samples for row in range(len(groups))]
        rollout.is_offline = [False] * len(groups)
        rollout.offline_scores = rollout.offline_logprobs = [None] * len(groups)
        uniform = self.uniform_noise(trainer, len(batch), num_samples, seed_key).to(
            algorithm.device
        )
        unused_noise = uniform.new_zeros(len(batch) * num_greedy, self.max_new_tokens)
        stop_ids, pad = self.stop_ids(trainer, algorithm), trainer.datamodule.tokenizer.pad_token_id
        with (
            trainer.precision_plugin.forward_context(),
            algorithm.policy.gather_weights() as policy,
        ):
            rollout.responses, rollout.sampling_logprobs = policy.generate(
                rollout,
                torch.cat([uniform, unused_noise]),
                rollout.is_greedy,
                stop_ids,
                pad,
                self.sampling,
            )
        if offline_responses:
            rollout = rollout.concat(
                offline_rows(batch, offline_responses, self.max_new_tokens, stop_ids, pad)
            )
        self.add_masks_and_texts(trainer, rollout, stop_ids)
        batch.replace_with(rollout)
        algorithm.on_rollout_end()

    def uniform_noise(
        self, trainer: Trainer, num_prompts: int, num_samples: int, seed_key: str
    ) -> Tensor:
        """[B * num_samples, R] uniform numbers: this rank's part of those of all ranks."""
        seed = random.Random(f"{torch.initial_seed()} {seed_key}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, trainer.world_size, num_samples, self.max_new_tokens)
        return torch.rand(shape, generator=generator)[:, trainer.global_rank].flatten(0, 1)

    def add_masks_and_texts(self, trainer: Trainer, batch: Experience, stop_ids: list[int]) -> None:
        """Writes masks, lengths and texts: the one moment that reads the tokens on the host."""
        ends = torch.tensor(stop_ids, device=batch.responses.device)
        batch.response_mask = through_first(batch.responses, stop_ids)
        stopped = (torch.isin(batch.responses, ends) & batch.response_mask).any(-1)
        batch.response_lengths = batch.response_mask.sum(-1).tolist()
        batch.truncated = (~stopped).tolist()
        batch.columns["completion"] = [
            self.format_response(trainer, tokens[: length if is_truncated else length - 1], prompt)
            for tokens, length, is_truncated, prompt in zip(
                batch.responses.tolist(),
                batch.response_lengths,
                batch.truncated,
                batch.columns["prompt"],
                strict=True,
            )
        ]

    def format_response(self, trainer: Trainer, tokens: list[int], prompt: object) -> object:
        """The answer in the form of its prompt: text, or a list with one message."""
        text = trainer.datamodule.decode(tokens)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def stop_ids(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> list[int]:
        """Token ids that end an answer: the policy's, the tokenizer's and the template's."""
        return sorted({*algorithm.policy.stop_ids, *trainer.datamodule.stop_ids})


def draw_offline(
    batch: Experience, number: int, seed_key: str, rank: int, world: int
) -> list[OfflineResponse]:
    """[B * number] answers, a prompt's side by side: each once while there are enough.

    Which ones depends on the seed, the moment and the prompt's place in the batch of all ranks, as
    a sample's noise does.

    Args:
        batch: B prompts of this rank, which holds each `world`-th of them all.
        number: Answers per prompt.
        seed_key: What is drawn for.
        rank: This one.
        world: Number of ranks.
    """
    if not number:
        return []
    if "offline_responses" not in batch.fields():
        raise UserError(
            "num_offline_samples asks for answers that come with the data: give `data` the class "
            "OfflineResponseData and rows with prompt and completion, or set num_offline_samples to 0."
        )
    found: list[OfflineResponse] = []
    for row, answers in enumerate(batch.offline_responses):
        place = row * world + rank
        source = random.Random(f"{torch.initial_seed()} {seed_key} stored {place}")
        found += sample_with_reuse(answers, number, source)
    return found


def sample_with_reuse(
    answers: Sequence[OfflineResponse], number: int, source: random.Random
) -> list[OfflineResponse]:
    """So many answers in random order, all of them before any comes again."""
    again, rest = divmod(number, len(answers))
    rounds = [len(answers)] * again + [rest]
    return [answer for size in rounds for answer in source.sample(answers, size)]


def offline_rows(
    batch: Experience,
    answers: Sequence[OfflineResponse],
    room: int,
    stop_ids: Sequence[int],
    pad: int,
) -> Experience:
    """The answers as rows beside sampled ones.

    Args:
        batch: B prompts.
        answers: [B * number], a prompt's side by side.
        room: R, tokens after which an answer is cut.
        stop_ids: Token ids that end an answer.
        pad: Token id that stands behind the end.
    """
    number = len(answers) // len(batch)
    rows = batch.repeat_interleave(number)
    said = [truncate_as_sampled(answer, room, stop_ids) for answer in answers]
    padded = [[*answer.tokens, *[pad] * (room - len(answer.tokens))] for answer in said]
    rows.responses = torch.tensor(padded).to(batch.prompts.device, non_blocking=True)
    rows.sampling_logprobs = torch.zeros(rows.responses.shape, device=batch.prompts.device)
    rows.group = [row for row in range(len(batch)) for _ in range(number)]
    rows.is_greedy, rows.is_offline = [False] * len(rows), [True] * len(rows)
    rows.offline_scores = [answer.score for answer in said]
    rows.offline_logprobs = [answer.logprob for answer in said]
    return rows


def truncate_as_sampled(
    answer: OfflineResponse, room: int, stop_ids: Sequence[int]
) -> OfflineResponse:
    """The answer as far as a policy would have got: to its first stop, or to the end of the room.

    Score and log-prob of a whole answer say nothing about a part of it.
    """
    ends = [place + 1 for place, token in enumerate(answer.tokens) if token in stop_ids]
    length = min([room, len(answer.tokens), *ends])
    whole = length == len(answer.tokens)
    return answer if whole else OfflineResponse(answer.tokens[:length], None, None)

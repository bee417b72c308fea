"""Responses of a rollout: sampled, decoded greedily, or drawn from the data set."""

import random
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience, OfflineResponse
from lit_align.data.offline_responses import draw_offline, offline_rows
from lit_align.errors import UserError
from lit_align.functional.masks import through_first
from lit_align.models.generation.decode import SamplingParams


class Rollout(Callback):
    """Generate responses to the prompts of each batch with the current policy.

    Training samples, decodes greedily and adds offline responses as the algorithm requires.
    Validation and test decode greedily. A sample depends on the seed, the iteration and the
    prompt's position in the batch of all ranks. So it is the same for any number of ranks and
    after any resume.

    Args:
        max_new_tokens: R, most tokens of a response.
        top_p: Probability mass of the most likely tokens that may be sampled. Below 1 the policy
            gradient is biased, because the samples are not from the policy's distribution.
        top_k: Number of most likely tokens that may be sampled. 0 means all.
        predict_greedy: Decode greedily in `predict`. Otherwise it samples.
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
                f"{max_new_tokens}, {top_p} and {top_k}. Set --rollout.max_new_tokens, "
                f"--rollout.top_p and --rollout.top_k."
            )
        if predict_samples < 1 or (predict_greedy and predict_samples > 1):
            raise UserError(
                f"predict_samples must be at least 1, and 1 with predict_greedy, found "
                f"{predict_samples}. Set --rollout.predict_samples."
            )
        self.max_new_tokens, self.sampling = max_new_tokens, SamplingParams(top_k, top_p)
        self.predict_greedy, self.predict_samples = predict_greedy, predict_samples

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Refuse offline algorithms, which need no responses."""
        if not isinstance(algorithm, OnlineAlgorithm):
            raise UserError(
                f"{type(algorithm).__name__} does not generate responses. Remove `rollout`."
            )

    def on_train_batch_start(
        self, trainer: Trainer, algorithm: OnlineAlgorithm, batch: Experience, batch_idx: int
    ) -> None:
        """Generate the responses of an iteration and add offline responses."""
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
        """Generate one greedy response per prompt."""
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
        """Generate `predict_samples` responses per prompt, or one greedy response."""
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
        """Replace B prompts by rows: B * num_samples, then B * num_greedy, then offline ones.

        Args:
            trainer: Trainer with the data module.
            algorithm: Algorithm with the policy.
            batch: B prompts, replaced in place.
            num_samples: G, sampled responses per prompt.
            num_greedy: Greedy responses per prompt, 0 or 1.
            seed_key: Text that selects the sampling noise, such as "train 3".
            offline_responses: Offline responses, the same number for each prompt, in prompt order.
        """
        rollout = rollout_rows(batch, num_samples, num_greedy)
        uniform = self.uniform_noise(trainer, len(batch), num_samples, seed_key)
        uniform = uniform.to(algorithm.device)
        # greedy rows ignore their noise
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
        """Return uniform noise [B * num_samples, R], the rows of this rank's prompts.

        Args:
            trainer: Trainer with rank and number of ranks.
            num_prompts: B, prompts of this rank.
            num_samples: G, samples per prompt.
            seed_key: Text that selects the noise. The global seed is part of it too.
        """
        # Every rank draws the noise of all ranks, so the result does not depend on the number of
        # ranks.
        seed = random.Random(f"{torch.initial_seed()} {seed_key}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, trainer.world_size, num_samples, self.max_new_tokens)
        return torch.rand(shape, generator=generator)[:, trainer.global_rank].flatten(0, 1)

    def add_masks_and_texts(self, trainer: Trainer, batch: Experience, stop_ids: list[int]) -> None:
        """Write response mask [N, R], lengths [N], truncation flags [N] and texts.

        Args:
            trainer: Trainer with the data module that decodes.
            batch: N responses, written in place.
            stop_ids: Token ids that end a response.
        """
        # the only place of a rollout that copies its tokens to the host
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
        """Return a response in the format of its prompt: text, or a list with one message.

        Args:
            trainer: Trainer with the data module that decodes.
            tokens: Token ids without the stop.
            prompt: Prompt of the response, text or messages.
        """
        text = trainer.datamodule.decode(tokens)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def stop_ids(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> list[int]:
        """Return the token ids that end a response: the policy's, tokenizer's and template's."""
        return sorted({*algorithm.policy.stop_ids, *trainer.datamodule.stop_ids})


def rollout_rows(batch: Experience, num_samples: int, num_greedy: int) -> Experience:
    """Return B prompts as rows without responses: B * num_samples, then B * num_greedy.

    Args:
        batch: B prompts.
        num_samples: G, sampled responses per prompt.
        num_greedy: Greedy responses per prompt, 0 or 1.

    Example:
        >>> rows = rollout_rows(Experience({}, prompts=torch.tensor([[5], [6]])), 2, 1)
        >>> rows.group, rows.is_greedy
        ([0, 0, 1, 1, 0, 1], [False, False, False, False, True, True])
    """
    prompts = list(range(len(batch)))
    groups = [row for row in prompts for _ in range(num_samples)] + prompts * num_greedy
    rows = batch.rows(groups)
    rows.group = groups
    rows.is_greedy = [row >= len(batch) * num_samples for row in range(len(groups))]
    rows.is_offline = [False] * len(groups)
    rows.offline_scores = rows.offline_logprobs = [None] * len(groups)
    return rows

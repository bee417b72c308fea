"""Scores of the responses of each batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from lit_align.algorithms.core.base import Algorithm
from lit_align.batches import Experience
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import RewardExecutor
from lit_align.rewards.weighted_sum import WeightedSum


class Reward(Callback):
    """Score responses with a weighted sum of reward functions. List it after `Rollout`.

    Args:
        functions: One or several reward functions: rules, reward models, Python functions.
        weights: Weight of each function's score. Default: 1 each.
        timeout: Most seconds of a call of a function. Default: no limit.
        skip_failed_prompts: Leave out all rows of a prompt if a function raises, returns NaN or
            exceeds the timeout, and log the number of such prompts. Otherwise the run stops.
    """

    def __init__(
        self,
        functions: RewardFunction | list[RewardFunction],
        weights: list[float] | None = None,
        timeout: float | None = None,
        skip_failed_prompts: bool = False,
    ):
        self.weighted_sum = WeightedSum(
            functions, weights, RewardExecutor(timeout, skip_failed_prompts)
        )
        self.skip_failed_prompts = skip_failed_prompts

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Load the models of the reward functions."""
        with trainer.precision_plugin.module_init_context():
            for source in self.weighted_sum.functions.values():
                source.setup(algorithm)

    @torch.no_grad()
    def score_batch(self, trainer: Trainer, batch: Experience) -> list[bool]:
        """Write the scores [N], and return for each row if it is scored.

        A row is not scored if its prompt is skipped.
        """
        with trainer.precision_plugin.forward_context(), raise_on_all_ranks(trainer):
            is_scored = self.weighted_sum(batch)
        if self.skip_failed_prompts:
            number = torch.tensor(float(sum(is_scored)), device=batch.responses.device)
            if trainer.strategy.reduce(number, reduce_op="sum") == 0:
                raise RewardError(
                    "every prompt of this batch was skipped, because a reward function failed. "
                    "Set --reward.skip_failed_prompts false to see the error."
                )
        return is_scored

    def source_statistics(
        self, trainer: Trainer, batch: Experience, rows: list[bool]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return mean, standard deviation and number of each function's scores over all ranks.

        Args:
            trainer: Trainer with the strategy that sums over the ranks.
            batch: N scored responses.
            rows: [N] True for the rows that count. Rows of a skipped prompt never count.
        """
        device, reduce = batch.responses.device, trainer.strategy.reduce
        columns = {name: batch.columns[f"scores/{name}"] for name in self.weighted_sum.functions}
        scores = torch.tensor(list(columns.values()), dtype=torch.float32, device=device)  # [S, N]
        mask = torch.tensor(rows, device=device) & ~scores.isnan()
        sums = torch.stack([torch.where(mask, scores, 0.0).sum(1), mask.sum(1).float()])
        total, number = reduce(sums, reduce_op="sum").unbind()
        mean = total / number
        squares = torch.where(mask, (scores - mean.unsqueeze(1)) ** 2, 0.0).sum(1)
        std = (reduce(squares, reduce_op="sum") / (number - 1).clamp(min=1)).sqrt()
        return dict(zip(columns, zip(mean, std, number, strict=True), strict=True))

    def log_skipped(
        self, algorithm: LightningModule, batch: Experience, is_scored: list[bool], prefix: str = ""
    ) -> None:
        """Log the number of skipped prompts, summed over all ranks.

        Args:
            algorithm: Algorithm that logs.
            batch: N responses.
            is_scored: [N] False for rows of a skipped prompt.
            prefix: Start of the log key, such as val/.
        """
        if self.skip_failed_prompts:
            pairs = zip(batch.group, is_scored, strict=True)
            number = float(len({group for group, known in pairs if not known}))
            name = f"{prefix}rewards/skipped_prompts"
            algorithm.log(name, number, sync_dist=True, reduce_fx="sum")

    def _evaluate(
        self, trainer: Trainer, algorithm: LightningModule, batch: Any, prefix: str | None
    ) -> None:
        """Score an evaluation batch and log the means of its new rows. Skipped rows do not count.

        Args:
            trainer: Trainer of the evaluation.
            algorithm: Algorithm that logs.
            batch: Batch. Ignored without responses of `Rollout`.
            prefix: Start of the log keys. None logs nothing and counts skipped rows.
        """
        if not has_responses(batch):
            return
        is_scored = self.score_batch(trainer, batch)
        if prefix is None:
            return
        batch.is_new = [a and b for a, b in zip(batch.is_new, is_scored, strict=True)]
        for name, (mean, _, number) in self.source_statistics(trainer, batch, batch.is_new).items():
            key, rows = f"{prefix}rewards/{name}/mean", int(number)
            algorithm.log(key, mean.nan_to_num(), batch_size=rows, sync_dist=True)
        self.log_skipped(algorithm, batch, is_scored, prefix)

    def on_train_batch_start(
        self, trainer: Trainer, algorithm: Algorithm, batch: Any, batch_idx: int
    ) -> None:
        """Score the rollout and log the statistics of its sampled rows."""
        if not has_responses(batch):
            return
        with algorithm.phase("score"):
            is_scored = self.score_batch(trainer, batch)
        for name, (mean, std, _) in self.source_statistics(
            trainer, batch, batch.is_sampled
        ).items():
            algorithm.log(f"rewards/{name}/mean", mean)
            algorithm.log(f"rewards/{name}/std", std)
        self.log_skipped(algorithm, batch, is_scored)

    def on_validation_batch_start(
        self, trainer: Trainer, algorithm: LightningModule, batch: Any, *index: int
    ) -> None:
        """Score the responses to the held-out prompts."""
        self._evaluate(trainer, algorithm, batch, "val/")

    def on_test_batch_start(
        self, trainer: Trainer, algorithm: LightningModule, batch: Any, *index: int
    ) -> None:
        """Score the responses to the held-out prompts."""
        self._evaluate(trainer, algorithm, batch, "test/")

    def on_predict_batch_start(
        self, trainer: Trainer, algorithm: LightningModule, batch: Any, *index: int
    ) -> None:
        """Score the responses. Lightning cannot log here."""
        self._evaluate(trainer, algorithm, batch, None)


@contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[None]:
    """Raise an error on every rank if the block fails on one of them.

    The other ranks would otherwise wait forever in the next collective.

    Raises:
        RewardError: On ranks without an error, with the message of the first rank that has one.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if trainer.world_size > 1:
        device = trainer.strategy.root_device
        failed = torch.tensor(int(failure is not None), device=device)
        if trainer.strategy.reduce(failed, reduce_op="sum") > 0:
            messages: list[str] = [""] * trainer.world_size
            distributed.all_gather_object(messages, str(failure or ""))
            rank = next(rank for rank, message in enumerate(messages) if message)
            failure = failure or RewardError(f"on rank {rank}: {messages[rank]}")
    if failure is not None:
        raise failure


def has_responses(batch: Any) -> bool:
    """Return True if `Rollout` has generated responses for the batch.

    Example:
        >>> has_responses(Experience(prompts=torch.zeros(1, 1)))
        False
    """
    return isinstance(batch, Experience) and "responses" in batch.fields()

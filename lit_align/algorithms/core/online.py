"""Base of online algorithms: one rollout in, one or more optimizer steps out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_at_least, check_choice
from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.minibatches import shuffle_rows
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k1, k3
from lit_align.models.policy import Policy

LossAggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


class OnlineAlgorithm(Algorithm):
    """Training on the policy's own responses, which callbacks sample and score before each step.

    One training step is one iteration of the paper. A subclass sets what to sample (the three
    attributes below), the advantages (`prepare`) and the loss (`losses`). It never generates,
    scores, steps or clips.

    Args:
        policy: The model to align.
        reference: The frozen model from which the KL is measured. Default: the policy at the
            start. For an adapted policy that is its base with the adapter disabled.
        offload_frozen: Keep frozen models on the CPU between uses. False keeps them on the GPU,
            which saves the copies.
        update_epochs: Passes over each rollout.
        minibatch_size: Rows per optimizer step and rank. Default: the whole rollout.
    """

    policy: Policy
    reference_model: ReferenceModel
    num_samples: int = 1  # sampled responses per prompt
    uses_greedy_baseline: bool = False  # True: one more response per prompt, decoded greedily
    num_offline_samples: int = 0  # offline responses per prompt, from the data set
    loss_aggregation: LossAggregation = "token_mean"  # how token losses become one number

    def __init__(
        self,
        policy: Callable[[], Policy],
        reference: Callable[[], Policy] | None = None,
        offload_frozen: bool = True,
        update_epochs: int = 1,
        minibatch_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.build_policy, self.reference_model = policy, ReferenceModel(reference, offload_frozen)
        check_at_least(1, update_epochs=update_epochs, minibatch_size=minibatch_size)
        self.update_epochs, self.minibatch_size = update_epochs, minibatch_size

    def setup(self, stage: str) -> None:
        """Check `loss_aggregation`: from Python any text can be passed.

        The command line checks it already.
        """
        check_choice(get_args(LossAggregation), loss_aggregation=self.loss_aggregation)
        super().setup(stage)

    def on_rollout_end(self) -> None:
        """Free GPU memory for the reward models. `Rollout` calls this after the last response."""

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """Run one iteration of the paper on a rollout with scores."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
            self.log_rollout(batch)
            self.reference_model.offload()
        for epoch in range(self.update_epochs):
            for rows in self.minibatches(len(batch), epoch):
                with self.phase("update"):
                    metrics = self.update(batch.rows(rows))
        self.end_iteration(metrics)

    def prepare(self, batch: Experience) -> Experience:
        """Add `logprobs`, `entropy` and `ref_logprobs`, each [N, R] nats.

        A subclass then adds `advantages`.
        """
        batch = self.add_ref_logprobs(batch)
        batch.logprobs, batch.entropy = self.map_microbatches(
            batch, self.policy.logprobs_and_entropy
        )
        return batch

    def add_ref_logprobs(self, batch: Experience) -> Experience:
        """Add `ref_logprobs` [N, R] nats."""
        (batch.ref_logprobs,) = self.map_microbatches(
            batch, lambda microbatch: (self.reference_logprobs(microbatch),)
        )
        return batch

    def reference_logprobs(self, batch: Experience) -> Tensor:
        """Return the reference's log-prob of each response token, [n, r] nats."""
        return self.reference_model.logprobs(batch)

    @property
    def has_single_update(self) -> bool:
        """True if each rollout has one optimizer step, whose policy is the sampling policy."""
        return self.update_epochs == 1 and self.minibatch_size is None

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Return the rows of each optimizer step: shuffled minibatches, or all rows in order.

        All ranks together train on the same rows as one process with the same number of rows.

        Args:
            num_rows: Rows of the rollout on this rank.
            epoch: Pass over the rollout, from 0. Each pass has another order.
        """
        size = self.minibatch_size or num_rows
        if num_rows % size:
            raise UserError(
                f"minibatch_size {size} does not divide the {num_rows} rows of a rollout. Set "
                f"--model.minibatch_size to a divisor."
            )
        rows = list(range(num_rows))
        if size < num_rows:
            # Torch's generator is not used: after a resume its state differs and the order would
            # change.
            seed = f"{torch.initial_seed()} {self.iteration} {epoch}"
            rows_per_prompt = self.num_samples + self.num_offline_samples
            ranks = self.trainer.global_rank, self.trainer.world_size
            rows = shuffle_rows(num_rows, rows_per_prompt, *ranks, seed)
        return [rows[start : start + size] for start in range(0, num_rows, size)]

    def log_rollout(self, batch: Experience) -> None:
        """Log the sampled responses under TRL's names."""
        mask, has_response = batch.response_mask, batch.response_mask.any(-1)
        means = {
            "reward": (batch.scores, has_response),
            "completions/mean_length": (mask.sum(-1), has_response),
            "completions/clipped_ratio": (self.as_device_tensor(batch.truncated), has_response),
        }
        if "logprobs" in batch.fields():  # otherwise the update adds these metrics
            means |= self.policy_metrics(batch)
        self.metrics.add_all(means)
        self.log("reward_std", self.moments_over_ranks(batch.scores, has_response)[2].sqrt())
        self.log("iteration", float(self.iteration + 1))

    def policy_metrics(self, batch: Experience) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (values, mask) of the metrics that need the policy's log-probs, by name."""
        mask = batch.response_mask
        difference = (batch.sampling_logprobs - batch.logprobs).abs()
        return {
            "kl": (k3(batch.logprobs, batch.ref_logprobs), mask),
            "kl/per_response_k1": (self.sequence_kl(batch), mask.any(-1)),
            "entropy": (batch.entropy, mask),
            "sampling/sampling_logp_difference/mean": (difference, mask),
        }

    def log_equal_groups(self, batch: Experience) -> None:
        """Log the fraction of prompts with equal scores. Their advantages are 0."""
        scores = batch.scores.view(-1, self.num_samples)
        has_response = batch.response_mask.any(-1).view(-1, self.num_samples).any(-1)
        equal = scores.amax(-1) == scores.amin(-1)  # the std may round to more than 0
        self.metrics.add("frac_reward_zero_std", equal, has_response)

    def moments_over_ranks(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return number, mean and unbiased variance of the masked values of all ranks.

        Args:
            values: [N, R] or [N].
            mask: Same shape, True where a value counts.

        Returns:
            Three float64 scalars [].
        """
        # Two passes, in float64: the variance is exact also if the mean is large.
        masked = values.double().where(mask, 0.0)
        number, total = self.sum_over_ranks(torch.stack([mask.sum().double(), masked.sum()]))
        mean = total / number.clamp(min=1.0)
        squares = (masked - mean).square().where(mask, 0.0).sum()
        return number, mean, self.sum_over_ranks(squares) / (number - 1).clamp(min=1.0)

    def aggregate(self, losses: Tensor, batch: Experience) -> Tensor:
        """Return token losses [n, r] whose sum, divided by `loss_denominator`, is the loss.

        Args:
            losses: [n, r] loss of each response token.
            batch: The n rows of the micro-batch.
        """
        if self.loss_aggregation != "sequence_mean":
            return losses
        # `update` sums over all tokens, which then is a sum of means over responses.
        return losses / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)

    def loss_denominator(self, batch: Experience) -> Tensor:
        """Return the number [] of this rank's response tokens for token_mean, else of responses."""
        if self.loss_aggregation == "token_mean":
            return super().loss_denominator(batch)
        return self.num_responses(batch)

    def num_responses(self, batch: Experience) -> Tensor:
        """Return the number [] of rows of this rank with an unmasked token."""
        return batch.response_mask.any(-1).sum()

    def sequence_kl(self, batch: Experience) -> Tensor:
        """Return the KL estimate k1 of each response, summed over its tokens, [N] nats."""
        difference = k1(batch.logprobs, batch.ref_logprobs)
        return difference.where(batch.response_mask, 0.0).sum(-1)

    def as_device_tensor(self, values: list[Any]) -> Tensor:
        """Return a list of N numbers as a float tensor [N], without waiting for the device."""
        return torch.tensor(values, dtype=torch.float).to(self.device, non_blocking=True)

    @torch.no_grad()
    def validation_step(self, batch: Experience, batch_idx: int) -> None:
        """Add a batch of scored greedy responses to the means of the evaluation."""
        batch = OnlineAlgorithm.prepare(self, batch)
        has_response = batch.response_mask.any(-1)
        means = {
            "reward": (batch.scores, has_response),
            "kl/per_response_k1": (self.sequence_kl(batch), has_response),
            "mean_length": (batch.response_mask.sum(-1).float(), has_response),
            "clipped_ratio": (self.as_device_tensor(batch.truncated), has_response),
        }
        self.metrics.add_eval(batch, **means)

    test_step = validation_step

    @torch.no_grad()
    def predict_step(self, batch: Experience, batch_idx: int) -> Experience:
        """Return the scored batch with the log-probs of both models."""
        # Not `self.prepare`: a subclass reads groups, and evaluation has one response per prompt.
        return OnlineAlgorithm.prepare(self, batch)

"""What every online algorithm shares: one rollout in, a few optimizer steps out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.minibatches import shuffle_rows
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k1, k3
from lit_align.models.policy import Policy

LossAggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


class OnlineAlgorithm(Algorithm):
    """Learns from its own answers, which callbacks have sampled and scored before each step.

    One training step = one iteration of the paper. A subclass says what to sample (the three
    attributes), what each token is worth (`prepare`) and what to minimise (`losses`). It never
    generates, scores, steps or clips.

    Args:
        policy: The model to align.
        reference: The frozen model to stay near. Default: the policy at the start, which for an
            adapted policy is its base with the adapter disabled.
        offload_frozen: Keep frozen models on the CPU between uses. False keeps them on the GPU, which saves
            the copies.
        update_epochs: Passes over each rollout.
        minibatch_size: Rows per optimizer step and rank; by default the whole rollout.
    """

    policy: Policy
    reference_model: ReferenceModel
    num_samples: int = 1  # sampled responses per prompt
    uses_greedy_baseline: bool = False  # and one more, decoded greedily
    num_offline_samples: int = 0  # and answers per prompt that came with the data
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
        if update_epochs < 1 or (minibatch_size is not None and minibatch_size < 1):
            raise UserError(
                f"update_epochs and minibatch_size must be at least 1, found {update_epochs} and "
                f"{minibatch_size}; leave out minibatch_size for whole rollouts."
            )
        self.update_epochs, self.minibatch_size = update_epochs, minibatch_size

    def on_rollout_end(self) -> None:
        """Leaves the device to what judges the answers; comes when all of them are there."""

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """One iteration of the paper, on prompts already answered and scored."""
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
        """Writes the log-probs of both models; a subclass goes on to write `advantages`."""
        batch = self.add_ref_logprobs(batch)
        batch.logprobs, batch.entropy = self.map_microbatches(
            batch, self.policy.logprobs_and_entropy
        )
        return batch

    def add_ref_logprobs(self, batch: Experience) -> Experience:
        """Writes the log-probs of the reference alone."""
        (batch.ref_logprobs,) = self.map_microbatches(
            batch, lambda microbatch: (self.reference_logprobs(microbatch),)
        )
        return batch

    def reference_logprobs(self, batch: Experience) -> Tensor:
        """Return the reference's log-prob of each response token, [n, R] nats."""
        return self.reference_model.logprobs(batch)

    @property
    def has_single_update(self) -> bool:
        """Whether one update follows each rollout: its policy is the one that has sampled."""
        return self.update_epochs == 1 and self.minibatch_size is None

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Rows of each optimizer step, shuffled anew each epoch; the whole rollout as it is.

        With more ranks, a step's rows on all of them are those of one process with as many rows.
        """
        size = self.minibatch_size or num_rows
        if num_rows % size:
            raise UserError(
                f"minibatch_size {size} does not divide the {num_rows} rows of a rollout."
            )
        rows = list(range(num_rows))
        if size < num_rows:
            seed = f"{torch.initial_seed()} {self.iteration} {epoch}"
            rows_per_prompt = self.num_samples + self.num_offline_samples
            ranks = self.trainer.global_rank, self.trainer.world_size
            rows = shuffle_rows(num_rows, rows_per_prompt, *ranks, seed)
        return [rows[start : start + size] for start in range(0, num_rows, size)]

    def log_rollout(self, batch: Experience) -> None:
        """Logs what was sampled, under TRL's names and PPO's old ones (nats per response)."""
        mask, has_response = batch.response_mask, batch.response_mask.any(-1)
        means = {
            "reward": (batch.scores, has_response),
            "completions/mean_length": (mask.sum(-1), has_response),
            "completions/clipped_ratio": (self.as_device_tensor(batch.truncated), has_response),
        }
        if "logprobs" in batch.fields():  # otherwise the update notes what it sees
            means |= self.policy_metrics(batch)
        self.metrics.add_all(means)
        self.log("reward_std", self.moments_over_ranks(batch.scores, has_response)[2].sqrt())
        self.log("iteration", float(self.iteration + 1))

    def policy_metrics(self, batch: Experience) -> dict[str, tuple[Tensor, Tensor]]:
        """What is logged of the log-probs, with masks: how far the policy is from others."""
        mask = batch.response_mask
        difference = (batch.sampling_logprobs - batch.logprobs).abs()
        return {
            "kl": (k3(batch.logprobs, batch.ref_logprobs), mask),
            "kl/per_response_k1": (self.sequence_kl(batch), mask.any(-1)),
            "entropy": (batch.entropy, mask),
            "sampling/sampling_logp_difference/mean": (difference, mask),
        }

    def log_equal_groups(self, batch: Experience) -> None:
        """Logs the share of prompts whose samples all score the same: they teach nothing."""
        scores = batch.scores.view(-1, self.num_samples)
        has_response = batch.response_mask.any(-1).view(-1, self.num_samples).any(-1)
        equal = scores.amax(-1) == scores.amin(-1)
        self.metrics.add("frac_reward_zero_std", equal, has_response)

    def moments_over_ranks(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and unbiased variance over all True of all ranks, each [] in float64."""
        masked = values.double().where(mask, 0.0)
        number, total = self.sum_over_ranks(torch.stack([mask.sum().double(), masked.sum()]))
        mean = total / number.clamp(min=1.0)
        squares = (masked - mean).square().where(mask, 0.0).sum()
        return number, mean, self.sum_over_ranks(squares) / (number - 1).clamp(min=1.0)

    def aggregate(self, losses: Tensor, batch: Experience) -> Tensor:
        """Return token losses [n, R] whose sum over `loss_denominator` is the loss.

        Args:
            losses: [n, R] of each response token.
            batch: Its n rows.
        """
        if self.loss_aggregation != "sequence_mean":
            return losses
        return losses / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)

    def loss_denominator(self, batch: Experience) -> Tensor:
        """Return the response tokens of this rank for token_mean, else its responses."""
        if self.loss_aggregation == "token_mean":
            return super().loss_denominator(batch)
        return self.num_responses(batch)

    def num_responses(self, batch: Experience) -> Tensor:
        """Rows with a token to learn from, on this rank."""
        return batch.response_mask.any(-1).sum()

    def sequence_kl(self, batch: Experience) -> Tensor:
        """[N] nats: how much likelier each response is under the policy than the reference."""
        difference = k1(batch.logprobs, batch.ref_logprobs)
        return difference.where(batch.response_mask, 0.0).sum(-1)

    def as_device_tensor(self, values: list[Any]) -> Tensor:
        """A Python list as a float tensor, without waiting for the device."""
        return torch.tensor(values, dtype=torch.float).to(self.device, non_blocking=True)

    @torch.no_grad()
    def validation_step(self, batch: Experience, batch_idx: int) -> None:
        """Adds greedy answers, already decoded and scored, to the epoch's means."""
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
        """The answered, scored batch with the log-probs of both models, for the table."""
        return OnlineAlgorithm.prepare(self, batch)


def check_group_size(algorithm: OnlineAlgorithm, num_samples: int) -> None:
    """A group of one has nothing to be compared with."""
    if num_samples < 2:
        raise UserError(
            f"{type(algorithm).__name__} compares the samples of a prompt: num_samples must be "
            f"at least 2, found {num_samples}."
        )

"""What every online algorithm shares: one rollout in, a few optimizer steps out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.minibatches import shuffled
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.batches import Experience
from lit_align.functional.kl import k1, k3
from lit_align.models.policy import Policy


class OnlineAlgorithm(Algorithm):
    """Learns from its own answers, which callbacks have sampled and scored before each step.

    One training step = one iteration of the paper. A subclass says what to sample (the three
    attributes), what each token is worth (`prepare`) and what to minimise (`losses`). It never
    generates, scores, steps or clips.

    Args:
        policy: The model to align.
        reference: The frozen model to stay near. Default: the policy at the start, which for an
            adapted policy is its base with the adapter disabled.
        park: Keep frozen models on the CPU between uses. False keeps them on the GPU, which saves
            the copies.
        epochs: Passes over each rollout.
        minibatch_size: Rows per optimizer step and rank; by default the whole rollout.
    """

    policy: Policy
    reference_model: ReferenceModel
    num_samples: int = 1  # sampled responses per prompt
    greedy_baseline: bool = False  # and one more, decoded greedily
    num_stored: int = 0  # and answers per prompt that came with the data

    def __init__(
        self,
        policy: Callable[[], Policy],
        reference: Callable[[], Policy] | None = None,
        park: bool = True,
        epochs: int = 1,
        minibatch_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.build_policy, self.reference_model = policy, ReferenceModel(reference, park)
        if epochs < 1 or (minibatch_size is not None and minibatch_size < 1):
            raise ValueError(
                f"epochs and minibatch_size must be at least 1, found {epochs} and "
                f"{minibatch_size}; leave out minibatch_size for whole rollouts."
            )
        self.epochs, self.minibatch_size = epochs, minibatch_size

    def make_room(self) -> None:
        """Leaves the device to what judges the answers; comes when all of them are there."""

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """One iteration of the paper, on prompts already answered and scored."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
            self.log_rollout(batch)
            self.reference_model.offload()
        for epoch in range(self.epochs):
            for rows in self.minibatches(len(batch), epoch):
                with self.phase("update"):
                    metrics = self.update(batch.rows(rows))
        self.end_iteration(metrics)

    def prepare(self, batch: Experience) -> Experience:
        """Writes the log-probs of both models; a subclass goes on to write `advantages`."""
        batch = self.compare(batch)
        batch.logprobs, batch.entropy = self.in_parts(batch, self.policy.score)
        return batch

    def compare(self, batch: Experience) -> Experience:
        """Writes the log-probs of the reference alone."""
        (batch.ref_logprobs,) = self.in_parts(batch, lambda part: (self.reference_logprobs(part),))
        return batch

    def reference_logprobs(self, batch: Experience) -> Tensor:
        """Return the reference's log-prob of each response token, [n, R] nats."""
        return self.reference_model.logprobs(batch)

    @property
    def updates_once(self) -> bool:
        """Whether one update follows each rollout: its policy is the one that has sampled."""
        return self.epochs == 1 and self.minibatch_size is None

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Rows of each optimizer step, shuffled anew each epoch; the whole rollout as it is.

        With more ranks, a step's rows on all of them are those of one process with as many rows.
        """
        size = self.minibatch_size or num_rows
        if num_rows % size:
            raise ValueError(
                f"minibatch_size {size} does not divide the {num_rows} rows of a rollout."
            )
        rows = list(range(num_rows))
        if size < num_rows:
            seed = f"{torch.initial_seed()} {self.iteration} {epoch}"
            per_prompt = self.num_samples + self.num_stored
            ranks = self.trainer.global_rank, self.trainer.world_size
            rows = shuffled(num_rows, per_prompt, *ranks, seed)
        return [rows[start : start + size] for start in range(0, num_rows, size)]

    def log_rollout(self, batch: Experience) -> None:
        """Logs what was sampled, under TRL's names and PPO's old ones (nats per response)."""
        mask, answered = batch.response_mask, batch.response_mask.any(-1)
        means = {
            "reward": (batch.scores, answered),
            "completions/mean_length": (mask.sum(-1), answered),
            "completions/clipped_ratio": (self.on_device(batch.truncated), answered),
        }
        if "logprobs" in batch.fields():  # otherwise the update notes what it sees
            means |= self.distances(batch)
        self.metrics.add_all(means)
        self.log("reward_std", self.moments(batch.scores, answered)[2].sqrt())
        self.log("rollout", float(self.iteration + 1))

    def distances(self, batch: Experience) -> dict[str, tuple[Tensor, Tensor]]:
        """What is logged of the log-probs, with masks: how far the policy is from others."""
        mask = batch.response_mask
        difference = (batch.sampling_logprobs - batch.logprobs).abs()
        return {
            "kl": (k3(batch.logprobs, batch.ref_logprobs), mask),
            "objective/kl": (self.sequence_kl(batch), mask.any(-1)),
            "entropy": (batch.entropy, mask),
            "sampling/sampling_logp_difference/mean": (difference, mask),
        }

    def log_equal_groups(self, batch: Experience) -> None:
        """Logs the share of prompts whose samples all score the same: they teach nothing."""
        scores = batch.scores.view(-1, self.num_samples)
        answered = batch.response_mask.any(-1).view(-1, self.num_samples).any(-1)
        equal = scores.amax(-1) == scores.amin(-1)
        self.metrics.add("frac_reward_zero_std", equal, answered)

    def moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and unbiased variance over all True of all ranks, each [] in float64."""
        kept = values.double().where(mask, 0.0)
        number, total = self.over_ranks(torch.stack([mask.sum().double(), kept.sum()]))
        mean = total / number.clamp(min=1.0)
        squares = (kept - mean).square().where(mask, 0.0).sum()
        return number, mean, self.over_ranks(squares) / (number - 1).clamp(min=1.0)

    def each_averaged(self, loss: Tensor, batch: Experience) -> Tensor:
        """[n, R]: each response's losses over its own number of tokens; to be summed."""
        return loss / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)

    def num_responses(self, batch: Experience) -> Tensor:
        """Rows with a token to learn from, on this rank."""
        return batch.response_mask.any(-1).sum()

    def sequence_kl(self, batch: Experience) -> Tensor:
        """[N] nats: how much likelier each response is under the policy than the reference."""
        difference = k1(batch.logprobs, batch.ref_logprobs)
        return difference.where(batch.response_mask, 0.0).sum(-1)

    def on_device(self, values: list[Any]) -> Tensor:
        """A Python list as a float tensor, without waiting for the device."""
        return torch.tensor(values, dtype=torch.float).to(self.device, non_blocking=True)

    @torch.no_grad()
    def validation_step(self, batch: Experience, batch_idx: int) -> None:
        """Adds greedy answers, already decoded and scored, to the epoch's means."""
        batch = OnlineAlgorithm.prepare(self, batch)
        answered = batch.response_mask.any(-1)
        means = {
            "reward": (batch.scores, answered),
            "objective/kl": (self.sequence_kl(batch), answered),
            "mean_length": (batch.response_mask.sum(-1).float(), answered),
            "clipped_ratio": (self.on_device(batch.truncated), answered),
        }
        self.metrics.add_eval(batch, **means)

    test_step = validation_step

    @torch.no_grad()
    def predict_step(self, batch: Experience, batch_idx: int) -> Experience:
        """The answered, scored batch with the log-probs of both models, for the table."""
        return OnlineAlgorithm.prepare(self, batch)


def refuse_single_samples(algorithm: OnlineAlgorithm, num_samples: int) -> None:
    """A group of one has nothing to be compared with."""
    if num_samples < 2:
        raise ValueError(
            f"{type(algorithm).__name__} compares the samples of a prompt: num_samples must be "
            f"at least 2, found {num_samples}."
        )

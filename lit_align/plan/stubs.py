"""Stubs of a simulated run: replace texts and scores, skip micro-batches of repeated shape."""

from __future__ import annotations

from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.microbatches import Compute
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.dpo import DPO
from lit_align.batches import AnyBatch, Experience
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker
from lit_align.rewards.reward_model import ModelReward


def fill_max_length_responses(
    rollout: Rollout, trainer: Trainer, batch: Experience, stops: list[int]
) -> None:
    """Replace `Rollout.add_masks_and_texts` if no response has stopped.

    Args:
        rollout: Rollout that is replaced.
        trainer: Trainer of the run.
        batch: N rows with responses [N, R], changed in place.
        stops: Ids of stop tokens; none was sampled.
    """
    number, width = batch.responses.shape
    batch.response_mask = torch.ones_like(batch.responses, dtype=torch.bool)
    batch.response_lengths, batch.truncated = [width] * number, [True] * number
    batch.columns["completion"] = [""] * number


class FakeReward:
    """Replacement of `Reward.score_batch`: it runs reward models, and every score is 0.

    Args:
        reward: Reward callback that is replaced.
        tracker: Tracker of storages.
    """

    def __init__(self, reward: Reward, tracker: MemoryTracker):
        self.reward, self.tracker = reward, tracker

    @torch.no_grad()
    def __call__(self, trainer: Trainer, batch: Experience) -> list[bool]:
        """Write scores [N] and a column for each reward function.

        Args:
            trainer: Trainer of the run.
            batch: N rows, changed in place.

        Returns:
            [N] True: every row is scored.
        """
        with trainer.precision_plugin.forward_context():
            for source in self.reward.weighted_sum.functions.values():
                if isinstance(source, ModelReward):
                    self.load_reward_model(source)
                # Functions without a network need text, and no memory of the device.
                if source.all_roles():
                    source(batch)
        number = len(batch)
        for name in self.reward.weighted_sum.functions:
            batch.columns[f"scores/{name}"] = [0.0] * number
        batch.scores = torch.zeros(number, device=batch.responses.device)
        return [True] * number

    def load_reward_model(self, source: ModelReward) -> None:
        """Load a reward model to the device and give it token ids instead of text.

        Args:
            source: Reward function with a network.
        """
        source.offloaded_weights.reload()
        for weight in source.network.parameters():
            self.tracker.label(weight, MemoryKind.PARAMETERS, MemoryLocation.DEVICE)
        overrides: dict[str, Any] = {"encode": partial(self.max_length_texts, source)}
        vars(source).update(overrides)

    def max_length_texts(self, source: ModelReward, batch: Experience) -> list[list[int]]:
        """Return token ids for two full passes of a reward model.

        Args:
            source: Reward function with a network.
            batch: N rows; each text has their length, or the maximum of the reward model.
        """
        # Two passes, because the results of the first are in memory during the second.
        length = min(batch.tokens.shape[1], source.max_tokens)
        rows = 2 * max(source.tokens_per_pass // length, 1)
        return [[0] * length] * min(rows, len(batch))


class SkipRepeatedMicrobatches:
    """Skip micro-batches and minibatches that cannot raise the peak.

    They have the same shape as two earlier ones.

    The second micro-batch runs with the gradients of the first. Keep also the
    last micro-batch: gradients are reduced there.

    Args:
        algorithm: Algorithm, whose methods are replaced.
    """

    def __init__(self, algorithm: Algorithm):
        self.algorithm, self.map_all_microbatches = algorithm, algorithm.map_microbatches
        self.sorted_microbatches = algorithm.split_microbatches
        replacements: dict[str, Any] = {
            "split_microbatches": self.split_microbatches,
            "map_microbatches": self.map_microbatches,
        }
        if isinstance(algorithm, OnlineAlgorithm):
            self.all_minibatches = algorithm.minibatches
            replacements["minibatches"] = self.minibatches
        for name, method in replacements.items():
            setattr(algorithm, name, method)

    def mix_lengths(self, batch: AnyBatch) -> list[list[int]]:
        """Return the row indices of all micro-batches, with rows of both lengths in each.

        Args:
            batch: N rows of two lengths.
        """
        # Sorted by length, one micro-batch would have all long rows and no padding.
        microbatches = self.sorted_microbatches(batch)
        rows = [row for part in microbatches for row in part]
        half = (len(rows) + 1) // 2
        pairs = zip_longest(rows[:half], rows[half:])
        order = iter([row for pair in pairs for row in pair if row is not None])
        return [list(islice(order, len(part))) for part in microbatches]

    def split_microbatches(self, batch: AnyBatch) -> list[list[int]]:
        """Return the first two micro-batches of each number of rows, and the last of all.

        Args:
            batch: N rows of two lengths.
        """
        microbatches = self.mix_lengths(batch)
        selected, counts = [], dict[int, int]()
        for rows in microbatches[:-1]:
            counts[len(rows)] = counts.get(len(rows), 0) + 1
            selected += [rows] if counts[len(rows)] <= 2 else []
        return [*selected, microbatches[-1]]

    def map_microbatches(self, batch: AnyBatch, compute: Compute) -> list[Tensor]:
        """Return the results of all micro-batches; from the third of a shape on they are zeros.

        Args:
            batch: N rows.
            compute: Function of a micro-batch that returns tensors with one entry per row.

        Returns:
            Tensors [N, ...] with the results of all rows.
        """
        known: dict[int, list[tuple[Tensor, ...]]] = {}

        def compute_or_repeat(part: AnyBatch) -> tuple[Tensor, ...]:
            results = known.setdefault(len(part), [])
            if len(results) < 2:
                results.append(compute(part))
                return results[-1]
            return tuple(torch.zeros_like(result) for result in results[-1])

        # All rows need a result here, so the selection of `split_microbatches` is switched off.
        self.algorithm.split_microbatches = self.mix_lengths
        try:
            return self.map_all_microbatches(batch, compute_or_repeat)
        finally:
            self.algorithm.split_microbatches = self.split_microbatches

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Return two minibatches of the first epoch and none of the others.

        Args:
            num_rows: Rows of the rollout.
            epoch: Number of the update epoch, from 0.
        """
        return self.all_minibatches(num_rows, epoch)[: 0 if epoch else 2]


def stub_precomputed(algorithm: Algorithm) -> None:
    """Replace precomputed reference log-probs by zeros, because a plan reads no data.

    Args:
        algorithm: DPO with `precompute`; any other algorithm is not changed.
    """
    if isinstance(algorithm, DPO) and algorithm.precomputed is not None:
        zeros = lambda pairs: torch.zeros(2, len(pairs)).unbind()  # noqa: E731
        algorithm.precomputed.lookup = zeros
        algorithm.on_train_start = lambda: None


def disable_metrics(algorithm: nn.Module) -> None:
    """Disable the metrics of an algorithm: Lightning would need their values.

    Args:
        algorithm: Algorithm, whose `log` and `log_dict` are replaced.
    """
    for name in ("log", "log_dict"):
        setattr(algorithm, name, lambda *args, **kwargs: None)

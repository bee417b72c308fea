"""What stands in a planned run for text, for rewards' values and for repetitions of one shape."""

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
    """`Rollout.add_masks_and_texts` where no answer has stopped.

    Args:
        rollout: Whose tokens they are.
        trainer: As there.
        batch: N rows.
        stops: Token ids that nobody has said.
    """
    number, width = batch.responses.shape
    batch.response_mask = torch.ones_like(batch.responses, dtype=torch.bool)
    batch.response_lengths, batch.truncated = [width] * number, [True] * number
    batch.columns["completion"] = [""] * number


class FakeReward:
    """`Reward.score_batch` that asks the sources with a network, and takes every score for 0.

    Args:
        reward: Whose sources.
        tracker: Told where reward models are.
    """

    def __init__(self, reward: Reward, tracker: MemoryTracker):
        self.reward, self.tracker = reward, tracker

    @torch.no_grad()
    def __call__(self, trainer: Trainer, batch: Experience) -> list[bool]:
        """Writes scores [N] and a column per source."""
        with trainer.precision_plugin.forward_context():
            for source in self.reward.weighted_sum.functions.values():
                if isinstance(source, ModelReward):
                    self.load_reward_model(source)
                if source.all_roles():
                    source(batch)
        number = len(batch)
        for name in self.reward.weighted_sum.functions:
            batch.columns[f"scores/{name}"] = [0.0] * number
        batch.scores = torch.zeros(number, device=batch.responses.device)
        return [True] * number

    def load_reward_model(self, source: ModelReward) -> None:
        """A reward model comes to the device, to read what stands in the place of text."""
        source.offloaded_weights.reload()
        for weight in source.network.parameters():
            self.tracker.label(weight, MemoryKind.PARAMETERS, MemoryLocation.DEVICE)
        overrides: dict[str, Any] = {"encode": partial(self.max_length_texts, source)}
        vars(source).update(overrides)

    def max_length_texts(self, source: ModelReward, batch: Experience) -> list[list[int]]:
        """Token ids for two full passes of a reward model, as long as the policy's own."""
        length = min(batch.tokens.shape[1], source.max_tokens)
        rows = 2 * max(source.tokens_per_pass // length, 1)
        return [[0] * length] * min(rows, len(batch))


class SkipRepeatedMicrobatches:
    """Micro-batches and minibatches of one shape are computed so often that no more can come.

    Gradients are there from the second micro-batch on, and reduced in the last.

    Args:
        algorithm: Whose.
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
        """All micro-batches, each with rows of both lengths, as a data set's have many."""
        plan = self.sorted_microbatches(batch)
        rows = [row for part in plan for row in part]
        half = (len(rows) + 1) // 2
        pairs = zip_longest(rows[:half], rows[half:])
        order = iter([row for pair in pairs for row in pair if row is not None])
        return [list(islice(order, len(part))) for part in plan]

    def split_microbatches(self, batch: AnyBatch) -> list[list[int]]:
        """The first two micro-batches of each length and number, and the last of all."""
        microbatches = self.mix_lengths(batch)
        selected, counts = [], dict[int, int]()
        for rows in microbatches[:-1]:
            counts[len(rows)] = counts.get(len(rows), 0) + 1
            selected += [rows] if counts[len(rows)] <= 2 else []
        return [*selected, microbatches[-1]]

    def map_microbatches(self, batch: AnyBatch, compute: Compute) -> list[Tensor]:
        """Results of all micro-batches, of which the third of a shape is like the second."""
        known: dict[int, list[tuple[Tensor, ...]]] = {}

        def compute_or_repeat(part: AnyBatch) -> tuple[Tensor, ...]:
            results = known.setdefault(len(part), [])
            if len(results) < 2:
                results.append(compute(part))
                return results[-1]
            return tuple(torch.zeros_like(result) for result in results[-1])

        self.algorithm.split_microbatches = self.mix_lengths
        try:
            return self.map_all_microbatches(batch, compute_or_repeat)
        finally:
            self.algorithm.split_microbatches = self.split_microbatches

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Two of the first epoch, none of the others."""
        return self.all_minibatches(num_rows, epoch)[: 0 if epoch else 2]


def stub_precomputed(algorithm: Algorithm) -> None:
    """Log-probs that are computed in advance are known without the data.

    Args:
        algorithm: A DPO with `precompute`, or any other.
    """
    if isinstance(algorithm, DPO) and algorithm.precomputed is not None:
        zeros = lambda pairs: torch.zeros(2, len(pairs)).unbind()  # noqa: E731
        algorithm.precomputed.lookup = zeros
        algorithm.on_train_start = lambda: None


def disable_logging(algorithm: nn.Module) -> None:
    """Metrics are a few numbers, and copying them needs their values."""
    for name in ("log", "log_dict"):
        setattr(algorithm, name, lambda *args, **kwargs: None)

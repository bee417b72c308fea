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
from lit_align.plan.memory_tracker import Kind, Ledger, Place
from lit_align.rewards.reward_model import LearnedReward


def longest_answers(
    rollout: Rollout, trainer: Trainer, batch: Experience, stops: list[int]
) -> None:
    """`Rollout.measure` where no answer has stopped.

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


class Judge:
    """`Reward.judge` that asks the sources with a network, and takes every score for 0.

    Args:
        reward: Whose sources.
        ledger: Told where reward models are.
    """

    def __init__(self, reward: Reward, ledger: Ledger):
        self.reward, self.ledger = reward, ledger

    @torch.no_grad()
    def __call__(self, trainer: Trainer, batch: Experience) -> list[bool]:
        """Writes scores [N] and a column per source."""
        with trainer.precision_plugin.forward_context():
            for source in self.reward.panel.sources.values():
                if isinstance(source, LearnedReward):
                    self.ask(source)
                if source.cast():
                    source(batch)
        number = len(batch)
        for name in self.reward.panel.sources:
            batch.columns[f"scores/{name}"] = [0.0] * number
        batch.scores = torch.zeros(number, device=batch.responses.device)
        return [True] * number

    def ask(self, source: LearnedReward) -> None:
        """A reward model comes to the device, to read what stands in the place of text."""
        source.sleeper.wake()
        for weight in source.scalar.parameters():
            self.ledger.tell(weight, Kind.PARAMETERS, Place.DEVICE)
        there: dict[str, Any] = {"encode": partial(self.texts, source)}
        vars(source).update(there)

    def texts(self, source: LearnedReward, batch: Experience) -> list[list[int]]:
        """Token ids for two full passes of a reward model, as long as the policy's own."""
        length = min(batch.tokens.shape[1], source.max_tokens)
        rows = 2 * max(source.tokens_per_pass // length, 1)
        return [[0] * length] * min(rows, len(batch))


class Once:
    """Micro-batches and minibatches of one shape are computed so often that no more can come.

    Gradients are there from the second micro-batch on, and reduced in the last.

    Args:
        algorithm: Whose.
    """

    def __init__(self, algorithm: Algorithm):
        self.algorithm, self.all_in_parts = algorithm, algorithm.in_parts
        self.sorted_plan = algorithm.plan
        changed: dict[str, Any] = {"plan": self.plan, "in_parts": self.in_parts}
        if isinstance(algorithm, OnlineAlgorithm):
            self.all_minibatches = algorithm.minibatches
            changed["minibatches"] = self.minibatches
        for name, method in changed.items():
            setattr(algorithm, name, method)

    def mixed(self, batch: AnyBatch) -> list[list[int]]:
        """All micro-batches, each with rows of both lengths, as a data set's have many."""
        plan = self.sorted_plan(batch)
        rows = [row for part in plan for row in part]
        half = (len(rows) + 1) // 2
        pairs = zip_longest(rows[:half], rows[half:])
        order = iter([row for pair in pairs for row in pair if row is not None])
        return [list(islice(order, len(part))) for part in plan]

    def plan(self, batch: AnyBatch) -> list[list[int]]:
        """The first two micro-batches of each length and number, and the last of all."""
        whole = self.mixed(batch)
        kept, seen = [], dict[int, int]()
        for rows in whole[:-1]:
            seen[len(rows)] = seen.get(len(rows), 0) + 1
            kept += [rows] if seen[len(rows)] <= 2 else []
        return [*kept, whole[-1]]

    def in_parts(self, batch: AnyBatch, compute: Compute) -> list[Tensor]:
        """Results of all micro-batches, of which the third of a shape is like the second."""
        known: dict[int, list[tuple[Tensor, ...]]] = {}

        def sparing(part: AnyBatch) -> tuple[Tensor, ...]:
            same = known.setdefault(len(part), [])
            if len(same) < 2:
                same.append(compute(part))
                return same[-1]
            return tuple(torch.zeros_like(result) for result in same[-1])

        self.algorithm.plan = self.mixed
        try:
            return self.all_in_parts(batch, sparing)
        finally:
            self.algorithm.plan = self.plan

    def minibatches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Two of the first epoch, none of the others."""
        return self.all_minibatches(num_rows, epoch)[: 0 if epoch else 2]


def refuse_nothing(algorithm: Algorithm) -> None:
    """Log-probs that are computed in advance are known without the data.

    Args:
        algorithm: A DPO with `precompute`, or any other.
    """
    if isinstance(algorithm, DPO) and algorithm.precomputed is not None:
        known = lambda pairs: torch.zeros(2, len(pairs)).unbind()  # noqa: E731
        algorithm.precomputed.of = known
        algorithm.on_train_start = lambda: None


def silent(algorithm: nn.Module) -> None:
    """Metrics are a few numbers, and copying them needs their values."""
    for name in ("log", "log_dict"):
        setattr(algorithm, name, lambda *args, **kwargs: None)

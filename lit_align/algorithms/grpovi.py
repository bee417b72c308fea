"""GRPOVI: GRPO with reward variance increase (arXiv:2505.23247)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.running_statistics import RunningBounds
from lit_align.algorithms.grpo import GRPO
from lit_align.batches import Experience
from lit_align.functional.variance import increase_variance

Weights = Callable[[Experience], Tensor]


class GRPOVI(GRPO):
    """GRPO on scores moved as far apart as their mean, order and bounds allow.

    The mean is weighted by how likely the reference finds each response. What is logged as
    `reward` are the raw scores. Dividing by the group's standard deviation undoes most of the
    increase (papers' note: only the shape is left), so `scale` is worth trying both ways.

    Args:
        low: Least possible score.
        high: Largest possible score.
        running_bounds: Take the least and the largest score seen so far instead.
        split_ties: Rank equal scores by their place in the group, as the problem literally
            says; that turns chance into advantage, so they are treated alike by default.
        weights: Log-weights [N] of the responses, not normalised; by default the paper's, the
            reference's log-probability of the whole response.
    """

    adjusts_by_policy = True  # as weights may: `policy_likelihood` does

    def __init__(
        self,
        low: float = 0.0,
        high: float = 1.0,
        running_bounds: bool = False,
        split_ties: bool = False,
        weights: Weights | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not low < high and not running_bounds:
            raise ValueError(
                f"GRPOVI spreads scores between low and high: low must be below high, found "
                f"{low} and {high}."
            )
        self.running_bounds, self.split_ties = running_bounds, split_ties
        self.weights = weights or reference_likelihood
        self.range = RunningBounds(low, high, running_bounds)

    def adjust(self, scores: Tensor, batch: Experience) -> Tensor:
        """[B, G] -> [B, G]: of the largest variance. Bounds stay on the device (no host read)."""
        if self.running_bounds:
            answered = batch.response_mask.any(-1).view_as(scores)
            least = scores.where(answered, torch.inf).amin()
            largest = scores.where(answered, -torch.inf).amax()
            extremes = torch.stack([-least, largest])
            self.range.widen(self.trainer.strategy.reduce(extremes, reduce_op="max"))
        low, high = self.range.bounds.double().unbind()
        room = torch.where(high > low, high - low, 1.0)  # nothing to spread in the first rollout
        low = low.where(high >= low, 0.0)  # and no bounds at all where nothing was answered
        probs = self.weights(batch).double().view_as(scores).softmax(-1)
        shares = (scores.double() - low) / room  # single precision would tie what differs little
        share = increase_variance(shares, probs, 0.0, 1.0, self.split_ties)
        return (low + share * room).type_as(scores)


def reference_likelihood(batch: Experience) -> Tensor:
    """[N] nats of whole responses under the reference: the published weights."""
    return batch.ref_logprobs.where(batch.response_mask, 0.0).sum(-1)


def mean_reference_likelihood(batch: Experience) -> Tensor:
    """[N] nats per token under the reference: groups of long responses stay groups."""
    return reference_likelihood(batch) / batch.response_mask.sum(-1).clamp(min=1)


def policy_likelihood(batch: Experience) -> Tensor:
    """[N] nats of whole responses under the sampling policy."""
    return batch.logprobs.where(batch.response_mask, 0.0).sum(-1)


def equal_weights(batch: Experience) -> Tensor:
    """[N] zeros: every response counts the same."""
    return torch.zeros_like(batch.scores)

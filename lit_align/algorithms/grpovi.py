"""GRPOVI: GRPO with reward variance increase (arXiv:2505.23247)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.running_statistics import RunningBounds
from lit_align.algorithms.grpo import GRPO
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.variance import increase_variance

ResponseWeights = Callable[[Experience], Tensor]


class GRPOVI(GRPO):
    """GRPO on scores moved as far apart as their mean, order and bounds allow.

    The mean is weighted by how likely the reference finds each response. What is logged as
    `reward` are the raw scores. Dividing by the group's standard deviation undoes most of the
    increase (papers' note: only the shape is left), so `scale` is worth trying both ways.

    Args:
        min_score: Least possible score.
        max_score: Largest possible score.
        running_bounds: Take the least and the largest score seen so far instead.
        split_ties: Rank equal scores by their place in the group, as the problem literally
            says; that turns chance into advantage, so they are treated alike by default.
        response_weights: Log-weights [N] of responses, unnormalized; by default the paper's, the
            reference's log-probability of the whole response.
    """

    shaping_needs_logprobs = True  # as weights may: `policy_likelihood` does

    def __init__(
        self,
        min_score: float = 0.0,
        max_score: float = 1.0,
        running_bounds: bool = False,
        split_ties: bool = False,
        response_weights: ResponseWeights | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not min_score < max_score and not running_bounds:
            raise UserError(
                f"min_score must be below max_score, found {min_score} and {max_score}."
            )
        self.running_bounds, self.split_ties = running_bounds, split_ties
        self.response_weights = response_weights or reference_likelihood
        self.range = RunningBounds(min_score, max_score, running_bounds)

    def shape_scores(self, scores: Tensor, batch: Experience) -> Tensor:
        """[B, G] -> [B, G]: of the largest variance. Bounds stay on the device (no host read)."""
        if self.running_bounds:
            has_response = batch.response_mask.any(-1).view_as(scores)
            least = scores.where(has_response, torch.inf).amin()
            largest = scores.where(has_response, -torch.inf).amax()
            extremes = torch.stack([-least, largest])
            self.range.update(self.trainer.strategy.reduce(extremes, reduce_op="max"))
        low, high = self.range.bounds.double().unbind()
        spread = torch.where(high > low, high - low, 1.0)  # nothing to spread in the first rollout
        low = low.where(high >= low, 0.0)  # and no bounds at all where nothing was answered
        probs = self.response_weights(batch).double().view_as(scores).softmax(-1)
        scaled = (scores.double() - low) / spread  # single precision would tie what differs little
        increased = increase_variance(scaled, probs, 0.0, 1.0, self.split_ties)
        return (low + increased * spread).type_as(scores)


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

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
    """GRPO on transformed scores of maximal variance.

    The mean, order and bounds of the group are kept.

    arXiv:2505.23247: in each group, maximize the variance of the scores, and keep their order,
    their bounds and their mean under the reference. `increase_variance` has the closed form.
    The log key `reward` is the raw score. With `advantage_scale` group_std, GRPO's division
    undoes most of the increase, so try none as well.

    Args:
        min_score: Smallest possible score.
        max_score: Largest possible score.
        running_bounds: Use the smallest and largest score of the run so far as the bounds.
        split_ties: Rank equal scores by their position in the group, as in the paper's problem.
            Then the order of sampling decides which of two equal scores gets the advantage.
            False: equal scores stay equal.
        response_weights: Function of a batch that returns unnormalized log-weights [N] of the
            responses. Default: the log-prob of each response under the reference, as in the paper.
    """

    shaping_needs_logprobs = True  # `response_weights` may, as `policy_likelihood` does

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
                f"min_score must be below max_score, found {min_score} and {max_score}. Set "
                f"--model.min_score and --model.max_score."
            )
        self.running_bounds, self.split_ties = running_bounds, split_ties
        self.response_weights = response_weights or reference_likelihood
        self.range = RunningBounds(min_score, max_score, running_bounds)

    def shape_scores(self, scores: Tensor, batch: Experience) -> Tensor:
        """Return the scores [B, G] of the largest variance.

        Args:
            scores: [B, G] scores of the responses.
            batch: The N = B*G rows.
        """
        if self.running_bounds:
            has_response = batch.response_mask.any(-1).view_as(scores)
            least = scores.where(has_response, torch.inf).amin()
            largest = scores.where(has_response, -torch.inf).amax()
            extremes = torch.stack([-least, largest])
            self.range.update(self.trainer.strategy.reduce(extremes, reduce_op="max"))
        low, high = self.range.bounds.double().unbind()  # on the device, no value is read
        spread = torch.where(high > low, high - low, 1.0)  # bounds may be equal at first
        low = low.where(high >= low, 0.0)  # without any response the bounds are infinite
        probs = self.response_weights(batch).double().view_as(scores).softmax(-1)
        scaled = (scores.double() - low) / spread  # float32 would round scores to ties
        increased = increase_variance(scaled, probs, 0.0, 1.0, self.split_ties)
        return (low + increased * spread).type_as(scores)


def reference_likelihood(batch: Experience) -> Tensor:
    """Return the log-prob [N] of each response under the reference, in nats.

    These are the weights of arXiv:2505.23247.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
        >>> reference_likelihood(Experience(ref_logprobs=logprobs, response_mask=mask)).tolist()
        [-3.0, -3.0]
    """
    return batch.ref_logprobs.where(batch.response_mask, 0.0).sum(-1)


def mean_reference_likelihood(batch: Experience) -> Tensor:
    """Return the mean log-prob [N] per token of each response under the reference, in nats.

    With long responses, the summed log-probs put nearly all weight on one response of a group.
    """
    return reference_likelihood(batch) / batch.response_mask.sum(-1).clamp(min=1)


def policy_likelihood(batch: Experience) -> Tensor:
    """Return the log-prob [N] of each response under the sampling policy, in nats."""
    return batch.logprobs.where(batch.response_mask, 0.0).sum(-1)


def equal_weights(batch: Experience) -> Tensor:
    """Return zeros [N]: all responses have the same weight."""
    return torch.zeros_like(batch.scores)

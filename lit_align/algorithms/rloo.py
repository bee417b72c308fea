"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, arXiv:2402.14740)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm, check_group_size
from lit_align.batches import Experience
from lit_align.functional.losses import clipped_surrogate
from lit_align.functional.returns import leave_one_out


class RLOO(OnlineAlgorithm):
    """A whole response is one action; its baseline is the mean return of the prompt's others.

    The return is the score less the nats by which the response exceeds the reference. The first
    step on a rollout is REINFORCE; further ones weigh by the clipped ratio of whole responses.

    Args:
        num_samples: G, responses per prompt.
        kl_coef: Score lost per nat of a response.
        clip_low: How far below 1 the ratio of a response to the sampling policy may count.
        clip_high: How far above 1 it may count.
    """

    loss_aggregation = "sequence_sum"

    def __init__(
        self,
        num_samples: int = 4,
        kl_coef: float = 0.05,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_group_size(self, num_samples)
        self.num_samples, self.kl_coef = num_samples, kl_coef
        self.clip_low, self.clip_high = clip_low, clip_high

    def prepare(self, batch: Experience) -> Experience:
        """Adds `advantages` [N]: one per response, since the response is the action."""
        batch = super().prepare(batch)
        self.log_equal_groups(batch)
        returns = batch.scores - self.kl_coef * self.sequence_kl(batch)
        batch.advantages = leave_one_out(returns.view(-1, self.num_samples)).flatten()
        return batch

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n]: the clipped surrogate of each whole response."""
        mask = batch.response_mask
        logprobs = self.policy.logprobs(batch).where(mask, 0.0).sum(-1)
        sampled = batch.logprobs.where(mask, 0.0).sum(-1)
        yield clipped_surrogate(logprobs, sampled, batch.advantages, self.clip_low, self.clip_high)

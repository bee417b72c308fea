"""GRPO (Shao et al., 2024, arXiv:2402.03300, eq. 3)."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm, check_group_size
from lit_align.batches import Experience
from lit_align.functional.kl import k3
from lit_align.functional.losses import clip_fractions, clipped_surrogate
from lit_align.functional.returns import group_relative


class GRPO(OnlineAlgorithm):
    """PPO's clipped loss; a response is worth how far its score stands out of its prompt's group.

    Args:
        num_samples: G, responses per prompt.
        kl_coef: Weight of the KL to the reference (k3, in the loss).
        clip_low: How far below 1 the ratio of a token to the sampling policy may count.
        clip_high: How far above 1 it may count; more than `clip_low` is DAPO's clip-higher.
        advantage_scale: group_std divides advantages by the standard deviation of the prompt's
            group; none does not, as Dr. GRPO (arXiv:2503.20783).
        loss_aggregation: token_mean averages over all response tokens, sequence_mean over each
            response's tokens and then over responses, sequence_sum sums each response's tokens
            and averages over responses.
    """

    shaping_needs_logprobs: bool = False  # `shape_scores` reads the policy's log-probs

    def __init__(
        self,
        num_samples: int = 8,
        kl_coef: float = 0.04,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        advantage_scale: Literal["group_std", "none"] = "group_std",
        loss_aggregation: LossAggregation = "sequence_mean",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_group_size(self, num_samples)
        self.num_samples, self.kl_coef = num_samples, kl_coef
        self.clip_low, self.clip_high = clip_low, clip_high
        self.advantage_scale, self.loss_aggregation = advantage_scale, loss_aggregation

    def prepare(self, batch: Experience) -> Experience:
        """Adds `advantages`: the same for every token of a response.

        Where one update follows, it finds the log-probs of the sampling policy by itself.
        """
        logprobs_in_update = self.has_single_update and not self.shaping_needs_logprobs
        batch = self.add_ref_logprobs(batch) if logprobs_in_update else super().prepare(batch)
        scores = batch.scores.view(-1, self.num_samples)
        self.log_equal_groups(batch)
        advantages = group_relative(
            self.shape_scores(scores, batch), scale=self.advantage_scale == "group_std"
        )
        batch.advantages = advantages.view(-1, 1).expand_as(batch.response_mask)
        return batch

    def shape_scores(self, scores: Tensor, batch: Experience) -> Tensor:
        """[B, G] -> [B, G]: the scores that advantages are made of. GRPOVI overrides this."""
        return scores

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n, R]: the clipped surrogate and the KL of each token."""
        has_logprobs = "logprobs" in batch.fields()
        logprobs = self.policy.logprobs(batch) if has_logprobs else self.on_policy_logprobs(batch)
        clipping = (batch.logprobs, batch.advantages, self.clip_low, self.clip_high)
        is_clipped_low, is_clipped_high = clip_fractions(logprobs, *clipping)
        for name, clipped in (
            ("low", is_clipped_low),
            ("high", is_clipped_high),
            ("region", is_clipped_low | is_clipped_high),
        ):
            self.metrics.add(f"clip_ratio/{name}_mean", clipped, batch.response_mask)
        loss = clipped_surrogate(logprobs, *clipping)
        loss = loss + self.kl_coef * k3(logprobs, batch.ref_logprobs)
        yield self.aggregate(loss, batch)

    def on_policy_logprobs(self, batch: Experience) -> Tensor:
        """[n, R] nats: log-probs, which are the sampling policy's, too; notes what is logged."""
        logprobs, batch.entropy = self.policy.logprobs_and_entropy(batch)
        batch.logprobs = logprobs.detach()
        self.metrics.add_all(self.policy_metrics(batch))
        return logprobs

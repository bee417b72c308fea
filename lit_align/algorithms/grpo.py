"""GRPO: group-relative policy optimization (Shao et al., 2024, arXiv:2402.03300)."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_choice, check_group_size
from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.functional.kl import k3
from lit_align.functional.losses import clip_fractions, clipped_surrogate
from lit_align.functional.returns import group_relative


class GRPO(OnlineAlgorithm):
    """PPO's clipped loss, with the score relative to the other samples of the prompt as advantage.

    Eq. 3 of arXiv:2402.03300: sample G responses per prompt. The advantage of each token of
    response i is A_i = (r_i - mean(r)) / std(r). The loss is the clipped surrogate plus
    kl_coef * k3 (eq. 4). There is no critic: the group's mean score is the baseline.

    Args:
        num_samples: G, responses per prompt.
        kl_coef: Coefficient of the KL to the reference (k3) in the loss.
        clip_low: Lower clip range of the importance ratio: it is clipped at 1 - clip_low.
        clip_high: Upper clip range of the importance ratio: it is clipped at 1 + clip_high. Larger
            than clip_low is the clip-higher of DAPO (arXiv:2503.14476).
        advantage_scale: group_std divides advantages by the standard deviation of the prompt's
            group. none does not divide, as in Dr. GRPO (arXiv:2503.20783).
        loss_aggregation: token_mean averages over all response tokens. sequence_mean averages
            over each response's tokens and then over responses. sequence_sum sums over each
            response's tokens and averages over responses.
    """

    shaping_needs_logprobs: bool = False  # True if `shape_scores` reads the policy's log-probs

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
        check_choice(("group_std", "none"), advantage_scale=advantage_scale)
        self.advantage_scale, self.loss_aggregation = advantage_scale, loss_aggregation

    def prepare(self, batch: Experience) -> Experience:
        """Add `advantages` [N, R], equal for all tokens of a response."""
        # In a single update the policy is the sampling policy. Its forward pass in `losses` then
        # gives the log-probs of both, which saves a pass here.
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
        """Return the scores [B, G] from which advantages are computed.

        Args:
            scores: [B, G] scores of the responses.
            batch: The N = B*G rows.
        """
        return scores

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the clipped surrogate plus the KL (k3) of each token, [n, r]."""
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
        """Return the policy's log-probs [n, r] in nats and store them as the sampling policy's."""
        # Detached, so that the ratio is 1 and its gradient that of the log-prob.
        logprobs, batch.entropy = self.policy.logprobs_and_entropy(batch)
        batch.logprobs = logprobs.detach()
        self.metrics.add_all(self.policy_metrics(batch))
        return logprobs

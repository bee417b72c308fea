"""ReMax: REINFORCE with a greedy baseline (Li et al., 2023, arXiv:2310.10505)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_at_least
from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k1
from lit_align.functional.returns import rewards_to_go


class ReMax(OnlineAlgorithm):
    """REINFORCE, with the score of the greedy response as the baseline of a prompt.

    Algorithm 1 of arXiv:2310.10505: sample y ~ pi(x) and decode y' = argmax pi(x). Ascend
    (r(x, y) - r(x, y')) grad log pi(y | x). There is no critic and no importance ratio, so a
    rollout has exactly one optimizer step. The baseline does not depend on y, so the gradient is
    unbiased.

    Args:
        kl_coef: KL penalty: reward subtracted per nat of log-ratio to the reference (k1).
        kl_to_go: Subtract the KL penalty of all later tokens as well. This is the exact gradient
            of the sequence KL. False: subtract only the penalty of the token itself.
        num_samples: Sampled responses per prompt, which share one greedy baseline.
        gamma: Discount of the advantage per token before the end. The released code uses 0.99.
        advantage_clip: Clip advantages to [-advantage_clip, advantage_clip]. Default: no clipping.
            The released code uses 5.
        loss_aggregation: token_mean averages over all response tokens. sequence_mean averages
            over each response's tokens and then over responses. sequence_sum sums over each
            response's tokens and averages over responses. The released code uses
            token_mean.
    """

    uses_greedy_baseline = True

    def __init__(
        self,
        kl_coef: float = 0.1,
        kl_to_go: bool = False,
        num_samples: int = 1,
        gamma: float = 1.0,
        advantage_clip: float | None = None,
        loss_aggregation: LossAggregation = "sequence_sum",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_at_least(1, num_samples=num_samples)
        if not self.has_single_update:
            raise UserError(
                f"ReMax takes one optimizer step per rollout, since it has no importance ratio, "
                f"found update_epochs {self.update_epochs} and minibatch_size "
                f"{self.minibatch_size}. Remove both, and set --data.batch_size to the prompts of "
                f"one step."
            )
        self.kl_coef, self.kl_to_go, self.num_samples = kl_coef, kl_to_go, num_samples
        self.gamma, self.advantage_clip = gamma, advantage_clip
        self.loss_aggregation = loss_aggregation

    def prepare(self, batch: Experience) -> Experience:
        """Drop the greedy rows, and add `advantages` [N, R]."""
        baseline = batch.rows([row for row, greedy in enumerate(batch.is_greedy) if greedy]).scores
        batch = batch.rows([row for row, greedy in enumerate(batch.is_greedy) if not greedy])
        batch = super().prepare(batch)  # without greedy rows, which need no log-probs
        advantage = batch.scores - baseline.repeat_interleave(self.num_samples)
        self.metrics.add("frac_reward_zero_std", advantage == 0, batch.response_mask.any(-1))
        batch.advantages = self.token_advantages(batch, advantage)
        return batch

    def token_advantages(self, batch: Experience, advantage: Tensor) -> Tensor:
        """Return gamma^(T-t+1) advantage - kl_coef k_t for each token, [N, R]; 0 where masked.

        Args:
            batch: N rows with the log-probs of policy and reference.
            advantage: [N] score above that of the greedy response.
        """
        mask = batch.response_mask
        if self.advantage_clip is not None:
            advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        tokens_left = mask.flip(-1).cumsum(-1).flip(-1)  # T - t + 1
        kl_penalty = k1(batch.logprobs, batch.ref_logprobs)
        if self.kl_to_go:
            kl_penalty = rewards_to_go(kl_penalty, mask)
        advantages = self.gamma**tokens_left * advantage.unsqueeze(-1) - self.kl_coef * kl_penalty
        return advantages.where(mask, 0.0)

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the REINFORCE loss [n, r]: -advantage * log-prob."""
        yield self.aggregate(-batch.advantages * self.policy.logprobs(batch), batch)

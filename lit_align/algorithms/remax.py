"""ReMax (Li et al., 2023, arXiv:2310.10505, Algorithm 1)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k1
from lit_align.functional.returns import rewards_to_go


class ReMax(OnlineAlgorithm):
    """REINFORCE; the baseline of a prompt is the score of its greedy response.

    No critic, no ratio, one optimizer step per rollout. The greedy answer gives only its score.

    Args:
        kl_coef: Reward lost per nat by which a token exceeds the reference.
        kl_to_go: Charge a token for all nats that follow it as well (the exact gradient of the
            sequence KL) instead of its own alone.
        num_samples: Sampled responses per prompt, which share one greedy baseline.
        gamma: Discount of the advantage per token before the end; the released code takes 0.99.
        advantage_clip: Largest advantage either way; the released code takes 5.
        loss_aggregation: token_mean averages over all response tokens, sequence_mean over each
            response's tokens and then over responses, sequence_sum sums each response's tokens
            and averages over responses. The released code takes
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
        if num_samples < 1:
            raise UserError(f"ReMax needs num_samples of at least 1, found {num_samples}.")
        if self.update_epochs > 1 or self.minibatch_size is not None:
            raise UserError(
                "ReMax takes one step per rollout, since it has no importance ratio: leave out "
                "update_epochs and minibatch_size, and set data.batch_size to one step's prompts."
            )
        self.kl_coef, self.kl_to_go, self.num_samples = kl_coef, kl_to_go, num_samples
        self.gamma, self.advantage_clip = gamma, advantage_clip
        self.loss_aggregation = loss_aggregation

    def prepare(self, batch: Experience) -> Experience:
        """Adds `advantages`: the score above the greedy one, less the price of the KL."""
        baseline = batch.rows([row for row, greedy in enumerate(batch.is_greedy) if greedy]).scores
        batch = batch.rows([row for row, greedy in enumerate(batch.is_greedy) if not greedy])
        batch = super().prepare(batch)
        advantage = batch.scores - baseline.repeat_interleave(self.num_samples)
        self.metrics.add("frac_reward_zero_std", advantage == 0, batch.response_mask.any(-1))
        batch.advantages = self.token_advantages(batch, advantage)
        return batch

    def token_advantages(self, batch: Experience, advantage: Tensor) -> Tensor:
        """[N, R]: gamma^(T-t+1) advantage - beta k_t; with kl_to_go, k summed from t on."""
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
        """[n, R]: the score function times its credit (papers' Algorithm 1)."""
        yield self.aggregate(-batch.advantages * self.policy.logprobs(batch), batch)

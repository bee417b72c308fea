"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, arXiv:2402.14740)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_group_size
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.functional.losses import clipped_surrogate
from lit_align.functional.returns import leave_one_out


class RLOO(OnlineAlgorithm):
    """REINFORCE, with the mean return of the prompt's other responses as the baseline.

    arXiv:2402.14740: a response is one action with the return
    R_i = score_i - kl_coef * log(pi(y_i | x) / pi_ref(y_i | x)). Ascend
    (R_i - mean of the other G - 1 returns) grad log pi(y_i | x). The baseline does not depend on
    y_i, so the gradient is unbiased. Further steps on a rollout use the response's clipped ratio.

    Args:
        num_samples: G, responses per prompt.
        kl_coef: KL penalty: score subtracted per nat of a response's log-ratio to the reference.
        clip_low: Lower clip range of a response's importance ratio: clipped at 1 - clip_low.
        clip_high: Upper clip range of a response's importance ratio: clipped at 1 + clip_high.
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
        """Add `advantages` [N], one per response."""
        batch = super().prepare(batch)
        self.log_equal_groups(batch)
        returns = batch.scores - self.kl_coef * self.sequence_kl(batch)
        batch.advantages = leave_one_out(returns.view(-1, self.num_samples)).flatten()
        return batch

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the clipped surrogate of each response, [n]."""
        # Token log-probs add up to that of the response. Its ratio is clipped, not those of tokens.
        mask = batch.response_mask
        logprobs = self.policy.logprobs(batch).where(mask, 0.0).sum(-1)
        sampled = batch.logprobs.where(mask, 0.0).sum(-1)
        yield clipped_surrogate(logprobs, sampled, batch.advantages, self.clip_low, self.clip_high)

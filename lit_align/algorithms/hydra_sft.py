"""Hydra-SFT: language model and reward model on one backbone (arXiv:2309.00754)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.metrics import Means
from lit_align.algorithms.reward_model import pair_accuracy
from lit_align.batches import PreferenceBatch
from lit_align.functional.losses import bradley_terry
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead


class HydraSFT(Algorithm):
    """Maximum likelihood of the chosen responses, and a higher score for them.

    The loss is the mean cross-entropy per chosen token, plus reward_loss_coef times the mean
    Bradley-Terry loss per pair. arXiv:2309.00754 publishes neither this sum nor its coefficient:
    both are our reconstruction.

    Args:
        policy: The language model with a reward head.
        reward_loss_coef: Coefficient of the reward loss.
    """

    policy: PolicyWithRewardHead

    def __init__(
        self,
        policy: Callable[[], PolicyWithRewardHead],
        reward_loss_coef: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.build_policy, self.reward_loss_coef = policy, reward_loss_coef

    def prepare(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Add `token_weights` [B]: pairs per chosen token, over all ranks."""
        # `update` divides by pairs. This factor turns the language loss into a mean over tokens.
        pairs = self.sum_over_ranks(self.loss_denominator(batch).float())
        tokens = self.sum_over_ranks(batch.chosen_target_mask[:, 1:].sum().float())
        batch.token_weights = (pairs / tokens.clamp(min=1)).expand(len(batch))
        return batch

    def losses(self, batch: PreferenceBatch) -> Iterator[Tensor]:
        """Yield the joint loss of each pair, [n] nats."""
        logprobs, scores = self.policy.score_pairs(batch)
        mask = batch.chosen_target_mask[:, 1:]
        chosen, rejected = scores.unbind(-1)
        preference = bradley_terry(chosen, rejected)
        self.metrics.add("language_loss", -logprobs, mask)
        self.metrics.add("reward_loss", preference, batch.loss_mask)
        self.metrics.add("accuracy", pair_accuracy(chosen, rejected), batch.loss_mask)
        yield -logprobs.sum(-1) * batch.token_weights + self.reward_loss_coef * preference

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add the batch's pairs to the means of both losses and the accuracy."""
        nll, chosen, rejected = self.map_microbatches(batch, self.nll_and_scores)
        tokens = batch.chosen_target_mask[:, 1:].sum(-1)
        self.metrics.add_eval(
            batch,
            language_loss=(nll / tokens.clamp(min=1), tokens),
            reward_loss=(bradley_terry(chosen, rejected), batch.loss_mask),
            accuracy=(pair_accuracy(chosen, rejected), batch.loss_mask),
        )

    def nll_and_scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return -log-prob [n] of the chosen responses in nats, and both scores [n], [n]."""
        logprobs, scores = self.policy.score_pairs(batch)
        return -logprobs.sum(-1), scores[:, 0], scores[:, 1]

    test_step = validation_step

    def derived_eval_metrics(self, means: Means) -> Means:
        """Return the joint loss of the two terms."""
        return {"loss": means["language_loss"] + self.reward_loss_coef * means["reward_loss"]}

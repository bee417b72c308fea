"""Hydra-SFT: one trunk learns to answer and to judge (arXiv:2309.00754; papers' note)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.metrics import Means
from lit_align.algorithms.reward_model import won
from lit_align.batches import Pairs
from lit_align.functional.losses import bradley_terry
from lit_align.models.policy_with_reward_head import TwoHeaded


class HydraSFT(Algorithm):
    """Maximum likelihood of the chosen answers, and a score that is higher for them.

    L = mean cross-entropy per token of the chosen answers + rm_coef * mean Bradley-Terry loss
    per pair. The form of the sum and the value of its weight are reconstructed, not published.

    Args:
        policy: The two-headed model to train.
        rm_coef: Weight of the reward loss, gamma.
    """

    policy: TwoHeaded

    def __init__(self, policy: Callable[[], TwoHeaded], rm_coef: float = 0.1, **kwargs: Any):
        super().__init__(**kwargs)
        self.build_policy, self.rm_coef = policy, rm_coef

    def prepare(self, batch: Pairs) -> Pairs:
        """Adds `token_weights`: what turns a sum over tokens of pairs into a mean over tokens."""
        pairs = self.over_ranks(self.count(batch).float())
        tokens = self.over_ranks(batch.chosen_loss_mask[:, 1:].sum().float())
        batch.token_weights = (pairs / tokens.clamp(min=1)).expand(len(batch))
        return batch

    def losses(self, batch: Pairs) -> Iterator[Tensor]:
        """[n] nats per pair."""
        logprobs, scores = self.policy.judge(batch)
        mask = batch.chosen_loss_mask[:, 1:]
        chosen, rejected = scores.unbind(-1)
        preference = bradley_terry(chosen, rejected)
        self.metrics.add("language_loss", -logprobs, mask)
        self.metrics.add("reward_loss", preference, batch.scored)
        self.metrics.add("accuracy", won(chosen, rejected), batch.scored)
        yield -logprobs.sum(-1) * batch.token_weights + self.rm_coef * preference

    @torch.no_grad()
    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Adds the batch's pairs to the language loss per token and to the accuracy."""
        nll, chosen, rejected = self.in_parts(batch, self.verdicts)
        tokens = batch.chosen_loss_mask[:, 1:].sum(-1)
        self.metrics.add_eval(
            batch,
            language_loss=(nll / tokens.clamp(min=1), tokens),
            reward_loss=(bradley_terry(chosen, rejected), batch.scored),
            accuracy=(won(chosen, rejected), batch.scored),
        )

    def verdicts(self, batch: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """([n] nats, [n], [n]): surprise of the chosen answers, and both scores."""
        logprobs, scores = self.policy.judge(batch)
        return -logprobs.sum(-1), scores[:, 0], scores[:, 1]

    test_step = validation_step

    def derived_eval_metrics(self, means: Means) -> Means:
        """Return the joint loss of the two terms."""
        return {"loss": means["language_loss"] + self.rm_coef * means["reward_loss"]}

"""A reward model from preference pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.batches import PreferenceBatch
from lit_align.functional.losses import bradley_terry
from lit_align.models.backbone import Backbone
from lit_align.models.scalar_head import ScalarHead


class RewardModel(Algorithm):
    """Learns a score that is higher for the chosen text; a step averages over pairs.

    Args:
        reward_model: The network that scores.
        use_margin: Ask for a lead of the data set's `margin` instead of any lead.
        center_coef: Weight of (chosen + rejected)^2, which keeps scores around 0
            (arXiv:2312.09244, section 2).
    """

    trained_roles = ("reward_model",)
    reward_model: ScalarHead

    def __init__(
        self,
        reward_model: Callable[[], ScalarHead],
        use_margin: bool = False,
        center_coef: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.build_reward_model = reward_model
        self.use_margin, self.center_coef = use_margin, center_coef

    def build(self) -> dict[str, Backbone]:
        """Return the unsharded reward model."""
        return {"reward_model": self.build_reward_model()}

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """([n], [n]): scores of the chosen and of the rejected texts."""
        chosen, rejected = self.reward_model.scores(batch.texts()).view(-1, 2).unbind(-1)
        return chosen, rejected

    def losses(self, batch: PreferenceBatch) -> Iterator[Tensor]:
        """[n] nats per pair."""
        chosen, rejected = self.scores(batch)
        loss = bradley_terry(chosen, rejected, batch.margin if self.use_margin else None)
        self.metrics.add("accuracy", pair_accuracy(chosen, rejected), batch.loss_mask)
        self.metrics.add("margin", chosen - rejected, batch.loss_mask)
        yield loss + self.center_coef * (chosen + rejected).square()

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds the batch's pairs to loss, accuracy and margin."""
        chosen, rejected = self.map_microbatches(batch, self.scores)
        pairs = batch.loss_mask
        self.metrics.add_eval(
            batch,
            loss=(bradley_terry(chosen, rejected), pairs),
            accuracy=(pair_accuracy(chosen, rejected), pairs),
            margin=(chosen - rejected, pairs),
        )

    test_step = validation_step


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[n] 1 where the chosen text scores higher, 0 where lower, 0.5 for a tie."""
    return ((chosen - rejected).sign() + 1) / 2

"""Reward model training on preference pairs (Ouyang et al., 2022, arXiv:2203.02155 eq. 1)."""

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
    """Bradley-Terry loss: the chosen text must score higher than the rejected one.

    Eq. 1 of arXiv:2203.02155: the loss is -log sigmoid(r(x, chosen) - r(x, rejected)), averaged
    over pairs. It assumes that P(chosen beats rejected) depends only on the difference of scores.

    Args:
        reward_model: The network that scores.
        use_margin: Subtract the data set's `margin` from the difference (arXiv:2307.09288 eq. 2).
        center_coef: Coefficient of (chosen + rejected)^2 in the loss, which keeps scores around 0
            (arXiv:2312.09244 section 2).
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
        """Return the scores [n] of the chosen and [n] of the rejected texts."""
        chosen, rejected = self.reward_model.scores(batch.texts()).view(-1, 2).unbind(-1)
        return chosen, rejected

    def losses(self, batch: PreferenceBatch) -> Iterator[Tensor]:
        """Yield the loss of each pair, [n] nats."""
        chosen, rejected = self.scores(batch)
        loss = bradley_terry(chosen, rejected, batch.margin if self.use_margin else None)
        self.metrics.add("accuracy", pair_accuracy(chosen, rejected), batch.loss_mask)
        self.metrics.add("margin", chosen - rejected, batch.loss_mask)
        yield loss + self.center_coef * (chosen + rejected).square()

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add the batch's pairs to the means of loss, accuracy and margin."""
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
    """Return 1 if the chosen text scores higher, 0 if lower, 0.5 for a tie, [n].

    Args:
        chosen: [n] scores of the chosen texts.
        rejected: [n] scores of the rejected texts.

    Example:
        >>> pair_accuracy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist()
        [1.0, 0.5, 0.0]
    """
    return ((chosen - rejected).sign() + 1) / 2

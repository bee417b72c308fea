"""A trunk with one number per token: reward model, and critic."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.kernels.packing import last_token_positions


class ScalarHead(Backbone):
    """A trunk and a linear head; `AutoModelForSequenceClassification` loads what it saves.

    Args:
        path: Hub id or folder: of a reward model, or of a language model that gets a new head.
    """

    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    head_name = "score"
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    config_overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def __init__(self, path: str | None = None, **kwargs: Any):
        super().__init__(path, **kwargs)
        if not isinstance(getattr(self.network, "score", None), nn.Module):
            raise UserError(
                f"{self.name} has no token-level `score` head; take a decoder-only architecture."
            )

    @classmethod
    def from_backbone(cls, model: Backbone) -> ScalarHead:
        """A copy of another network's trunk as it is, with a new head.

        Args:
            model: Whole and without an adapter.
        """
        if model.adapted is not None:
            raise UserError(
                f"{model.name} has an adapter, and a copy of its trunk would train whole: give "
                f"the critic a path or config of its own, with lora."
            )
        trunk = model.network.base_model
        dtype = str(next(trunk.parameters()).dtype).removeprefix("torch.")
        if model.path is not None:  # from there again, so that no rank needs whole weights
            critic = cls(model.path, dtype=dtype, **model.load_options)
        else:
            critic = cls(
                config=model.network.config.to_dict(),
                dtype=dtype,
                attn_implementation=model.load_options["attn_implementation"],
                activation_checkpointing=model.network.is_gradient_checkpointing,
                sltrain=model.sltrain,
            )
            critic.network.base_model.load_state_dict(trunk.state_dict())
        critic.name = f"{model.name}'s trunk"
        return critic

    def values(self, batch: Experience | TextBatch) -> Tensor:
        """[N, T] the head's number at each token of the whole text."""
        values: Tensor = self(self._values, batch)
        return values

    def _values(self, batch: Experience | TextBatch) -> Tensor:
        head = self.network.score
        values: Tensor = head(self.hidden_states(batch).to(head.weight.dtype)).squeeze(-1)
        return values.float()

    def state_values(self, batch: Experience) -> Tensor:
        """[N, R] the head's number before each scored token is chosen; 0 off the mask."""
        return values_before_tokens(self.values(batch), batch)

    def scores(self, batch: Experience | TextBatch) -> Tensor:
        """[N] the head's number at the last real token."""
        return values_at_last_token(self.values(batch), batch)


def values_before_tokens(values: Tensor, batch: Experience) -> Tensor:
    """Values [N, T] -> [N, R]: those of the state in which each token is chosen; 0 off the mask."""
    return values[:, batch.num_context_tokens - 1 : -1].where(batch.loss_mask, 0.0)


def values_at_last_token(values: Tensor, batch: Experience | TextBatch) -> Tensor:
    """Values [N, T] -> [N]: those at the last real token."""
    return values.flatten().index_select(0, last_token_positions(batch))

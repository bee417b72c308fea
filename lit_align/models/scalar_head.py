"""A trunk with one number per token: reward model, and critic."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_align.batches import Experience, Tokens
from lit_align.models.backbone import Backbone
from lit_align.models.kernels.packing import last_places


class Scalar(Backbone):
    """A trunk and a linear head; `AutoModelForSequenceClassification` loads what it saves.

    Args:
        path: Hub id or folder: of a reward model, or of a language model that gets a new head.
    """

    auto = AutoModelForSequenceClassification
    task = "SEQ_CLS"
    reads = "score"
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def __init__(self, path: str | None = None, **kwargs: Any):
        super().__init__(path, **kwargs)
        if not isinstance(getattr(self.network, "score", None), nn.Module):
            raise ValueError(
                f"{self.name} has no token-level `score` head; take a decoder-only architecture."
            )

    @classmethod
    def on_trunk(cls, model: Backbone) -> Scalar:
        """A copy of another network's trunk as it is, with a new head.

        Args:
            model: Whole and without an adapter.
        """
        if model.adapted is not None:
            raise ValueError(
                f"{model.name} has an adapter, and a copy of its trunk would train whole: give "
                f"the critic a path or config of its own, with lora."
            )
        trunk = model.network.base_model
        dtype = str(next(trunk.parameters()).dtype).removeprefix("torch.")
        if model.path is not None:  # from there again, so that no rank needs whole weights
            copy = cls(model.path, dtype=dtype, **model.reading)
        else:
            copy = cls(
                config=model.network.config.to_dict(),
                dtype=dtype,
                attention=model.reading["attention"],
                checkpointing=model.network.is_gradient_checkpointing,
                sltrain=model.sltrain,
            )
            copy.network.base_model.load_state_dict(trunk.state_dict())
        copy.name = f"{model.name}'s trunk"
        return copy

    def values(self, batch: Experience | Tokens) -> Tensor:
        """[N, T] the head's number at each token of the whole text."""
        values: Tensor = self(self._values, batch)
        return values

    def _values(self, batch: Experience | Tokens) -> Tensor:
        head = self.network.score
        values: Tensor = head(self.hidden(batch).to(head.weight.dtype)).squeeze(-1)
        return values.float()

    def state_values(self, batch: Experience) -> Tensor:
        """[N, R] the head's number before each scored token is chosen; 0 off the mask."""
        return before_each_token(self.values(batch), batch)

    def scores(self, batch: Experience | Tokens) -> Tensor:
        """[N] the head's number at the last real token."""
        return at_last_token(self.values(batch), batch)


def before_each_token(values: Tensor, batch: Experience) -> Tensor:
    """Values [N, T] -> [N, R]: those of the state in which each token is chosen; 0 off the mask."""
    return values[:, batch.num_context - 1 : -1].where(batch.scored, 0.0)


def at_last_token(values: Tensor, batch: Experience | Tokens) -> Tensor:
    """Values [N, T] -> [N]: those at the last real token."""
    return values.flatten().index_select(0, last_places(batch))

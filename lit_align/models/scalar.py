"""A trunk with one number per token: reward model, and critic."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_align.batches import Experience, Tokens
from lit_align.models.backbone import Backbone


class Scalar(Backbone):
    """A trunk and a linear head; `AutoModelForSequenceClassification` loads what it saves.

    Args:
        path: Hub id or folder: of a reward model, or of a language model that gets a new head.
    """

    auto = AutoModelForSequenceClassification
    task = "SEQ_CLS"
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def __init__(self, path: str | None = None, **kwargs: Any):
        super().__init__(path, **kwargs)
        if not isinstance(getattr(self.network, "score", None), nn.Module):
            raise ValueError(
                f"{self.name} has no token-level `score` head; take a decoder-only architecture."
            )

    def values(self, batch: Experience | Tokens) -> Tensor:
        """[N, T] the head's number at each token of the whole text."""
        values: Tensor = self(self._values, batch)
        return values

    def _values(self, batch: Experience | Tokens) -> Tensor:
        values: Tensor = self.network.score(self.hidden(batch)).squeeze(-1)
        return values.float()

    def scores(self, batch: Experience | Tokens) -> Tensor:
        """[N] the head's number at the last real token."""
        steps = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        last = (batch.token_mask * steps).argmax(-1, keepdim=True)
        return self.values(batch).gather(-1, last).squeeze(-1)

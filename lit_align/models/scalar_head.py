"""A backbone with one number per token, for reward models and critics."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.kernels.packing import last_token_positions


class ScalarHead(Backbone):
    """A backbone with a linear head to one number, as `AutoModelForSequenceClassification` has it.

    Args:
        path: Hub id or folder of a reward model, or of a language model that gets a new head.
            Default: random weights from `config`.

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> config = {"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 1, **sizes}
        >>> ScalarHead(config=config).network.score.weight.shape
        torch.Size([1, 8])
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
                f"{self.name} has no token-level `score` head. Use a decoder-only architecture."
            )

    @classmethod
    def from_backbone(cls, model: Backbone) -> ScalarHead:
        """Copy the backbone of another network, and add a new head.

        Args:
            model: Unsharded network without an adapter.
        """
        if model.adapted is not None:
            raise UserError(
                f"{model.name} has an adapter, and a critic copied from its backbone would train "
                f"all weights. Set --model.critic.path or --model.critic.config, and "
                f"--model.critic.lora."
            )
        backbone = model.network.base_model
        dtype = str(next(backbone.parameters()).dtype).removeprefix("torch.")
        if model.path is not None:  # read the files again, so that no rank needs unsharded weights
            critic = cls(model.path, dtype=dtype, **model.load_options)
        else:
            critic = cls(
                config=model.network.config.to_dict(),
                dtype=dtype,
                attn_implementation=model.load_options["attn_implementation"],
                activation_checkpointing=model.network.is_gradient_checkpointing,
                sltrain=model.sltrain,
            )
            critic.network.base_model.load_state_dict(backbone.state_dict())
        critic.name = f"a copy of {model.name}"
        return critic

    def values(self, batch: Experience | TextBatch) -> Tensor:
        """Return the head's output at each token, [N, T] in float32.

        Args:
            batch: N texts of T tokens.
        """
        values: Tensor = self(self._values, batch)
        return values

    def _values(self, batch: Experience | TextBatch) -> Tensor:
        head = self.network.score
        values: Tensor = head(self.hidden_states(batch).to(head.weight.dtype)).squeeze(-1)
        return values.float()

    def state_values(self, batch: Experience) -> Tensor:
        """Return V(s_t) for each response token, [N, R]; 0 where masked.

        Args:
            batch: N rows with responses of R tokens.
        """
        return values_before_tokens(self.values(batch), batch)

    def scores(self, batch: Experience | TextBatch) -> Tensor:
        """Return the head's output at the last real token of each text, [N].

        Args:
            batch: N texts of T tokens.
        """
        return values_at_last_token(self.values(batch), batch)


def values_before_tokens(values: Tensor, batch: Experience) -> Tensor:
    """Return V(s_t) for each response token, [N, R]; 0 where masked.

    V(s_t) is read at the token before, because it must not depend on the token t that is chosen.

    Args:
        values: [N, T] values at each token of prompt and response.
        batch: N rows with prompts of P and responses of R tokens, T = P + R.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True, False]])
        >>> batch = Experience(prompts=torch.zeros(1, 2), response_mask=mask)
        >>> values_before_tokens(torch.arange(5.0)[None], batch).tolist()
        [[1.0, 2.0, 0.0]]
    """
    return values[:, batch.num_context_tokens - 1 : -1].where(batch.loss_mask, 0.0)


def values_at_last_token(values: Tensor, batch: Experience | TextBatch) -> Tensor:
    """Return the value at the last real token of each text, [N].

    Args:
        values: [N, T] values at each token.
        batch: N texts of T tokens.

    Example:
        >>> import torch
        >>> batch = TextBatch(token_mask=torch.tensor([[True, True, False], [True, True, True]]))
        >>> values_at_last_token(torch.arange(6.0).view(2, 3), batch).tolist()
        [1.0, 5.0]
    """
    return values.flatten().index_select(0, last_token_positions(batch))

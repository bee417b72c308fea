"""Last hidden states of a batch: from packed texts, or from padded ones with a mask."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batches import Experience, Tokens
from lit_align.models.kernels.packing import reading


def packed_hidden(network: PreTrainedModel, batch: Experience | Tokens) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of all texts in one row of t tokens, without padding.

    Args:
        network: Network whose attention reads packed texts.
        batch: N texts of T tokens.

    Returns:
        The hidden states [t, H], and the index [N * T] of the batch's tokens in them.
    """
    read = reading(batch)
    hidden = last_hidden(
        network,
        input_ids=read.tokens,
        position_ids=read.positions,
        attention_mask=read.packed.as_mask,
        packed=read.packed,
    )
    return hidden.squeeze(0), read.back


def masked_hidden(network: PreTrainedModel, batch: Experience | Tokens) -> Tensor:
    """Return the hidden states [N, T, H] of padded texts; the padding may be anywhere.

    Args:
        network: Any network.
        batch: N texts of T tokens.
    """
    mask = batch.token_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return last_hidden(
        network, input_ids=batch.tokens, attention_mask=mask.long(), position_ids=positions
    )


def last_hidden(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden state [n, t, H] of token ids [n, t].

    Args:
        network: Any network.
        **inputs: Inputs of its base model.
    """
    hidden: Tensor = network.base_model(use_cache=False, **inputs).last_hidden_state
    return hidden

"""Last hidden states of a batch: from packed texts, or from padded ones with a mask."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batches import Experience, TextBatch
from lit_align.models.kernels.packing import pack


def packed_hidden_states(
    network: PreTrainedModel, batch: Experience | TextBatch
) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of all texts in one row of t tokens, without padding.

    Args:
        network: Network whose attention reads packed texts.
        batch: N texts of T tokens.

    Returns:
        The hidden states [t, H], and the index [N * T] of the batch's tokens in them.
    """
    packed = pack(batch)
    hidden = last_hidden(
        network,
        input_ids=packed.tokens,
        position_ids=packed.positions,
        attention_mask=packed.sequence_lengths.as_attention_mask,
        packed=packed.sequence_lengths,
    )
    return hidden.squeeze(0), packed.unpack_index


def padded_hidden_states(network: PreTrainedModel, batch: Experience | TextBatch) -> Tensor:
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

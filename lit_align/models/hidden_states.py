"""Last hidden states of a batch, from packed texts or from padded texts and a mask."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batches import Experience, TextBatch
from lit_align.models.kernels.packing import is_trimmed, pack


def all_hidden_states(
    network: PreTrainedModel, batch: Experience | TextBatch, uses_packing: bool
) -> Tensor:
    """Return the hidden states [N, T, H]. If packed, padding repeats the nearest token's state.

    Args:
        network: Network with or without adapters.
        batch: N texts of T tokens.
        uses_packing: True if the network's attention supports packed texts.
    """
    if not uses_packing or not is_trimmed(batch):
        return padded_hidden_states(network, batch)
    row, unpack_index = packed_hidden_states(network, batch)
    return row.index_select(0, unpack_index).view(*batch.tokens.shape, -1)


def select_hidden_states(
    network: PreTrainedModel, batch: Experience | TextBatch, uses_packing: bool, index: Tensor
) -> Tensor:
    """Return the hidden states [n, H] at some tokens, without building [N, T, H] if packed.

    Args:
        network: Network with or without adapters.
        batch: N texts of T tokens.
        uses_packing: True if the network's attention supports packed texts.
        index: [n] positions of the tokens in [N * T].
    """
    if not uses_packing or not is_trimmed(batch):
        return padded_hidden_states(network, batch).flatten(0, 1).index_select(0, index)
    row, unpack_index = packed_hidden_states(network, batch)
    return row.index_select(0, unpack_index.index_select(0, index))


def packed_hidden_states(
    network: PreTrainedModel, batch: Experience | TextBatch
) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of all texts in one row, without padding.

    Args:
        network: Network with an attention that supports packed texts.
        batch: N texts of T tokens, with S real tokens in all.

    Returns:
        Hidden states [S, H], and the index [N * T] in them of each token of the batch.
    """
    packed = pack(batch)
    hidden = last_hidden(
        network,
        input_ids=packed.tokens,
        position_ids=packed.positions,
        attention_mask=packed.sequence_lengths.as_attention_mask,
        sequence_lengths=packed.sequence_lengths,
    )
    return hidden.squeeze(0), packed.unpack_index


def padded_hidden_states(network: PreTrainedModel, batch: Experience | TextBatch) -> Tensor:
    """Return the hidden states [N, T, H] of padded texts. The padding may be on either side.

    Args:
        network: Network with any attention.
        batch: N texts of T tokens.
    """
    # positions count real tokens only, so that padding in front does not shift a text
    mask = batch.token_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return last_hidden(
        network, input_ids=batch.tokens, attention_mask=mask.long(), position_ids=positions
    )


def last_hidden(network: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden state [n, t, H] of token ids [n, t].

    Args:
        network: Network with or without adapters.
        **inputs: Inputs of its base model, such as input_ids [n, t].
    """
    hidden: Tensor = network.base_model(use_cache=False, **inputs).last_hidden_state
    return hidden

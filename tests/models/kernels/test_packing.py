"""Packing puts all sequences in one row without padding, and its index restores the batch."""

import torch
from tiny_models import RandomPairs, RandomTexts, ragged_rollout, tiny

from lit_align.batches import TextBatch
from lit_align.models.hidden_states import padded_hidden_states
from lit_align.models.kernels.packing import last_token_positions, pack, scored_positions


def test_a_rollout_is_packed_in_one_row():
    """16 real tokens in 3 rows of 9 positions."""
    packed = pack(ragged_rollout())
    texts = [range(5, 10), range(12, 18), [25, *range(26, 30)]]
    assert packed.tokens.tolist() == [[token for text in texts for token in text]]
    assert packed.positions.tolist() == [[*range(5), *range(6), *range(5)]]
    assert packed.sequence_lengths.cu_seqlens.tolist() == [0, 5, 11, 16]
    # Padding has the index of the nearest token of its row.
    assert packed.unpack_index.view(3, 9).tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 4, 4],
        [5, 6, 7, 8, 9, 10, 10, 10, 10],
        [11, 11, 11, 11, 11, 12, 13, 14, 15],
    ]


def test_only_real_tokens_are_scored():
    """Texts of 3, 8, 5 and 2 tokens: all but the first are scored, in rows of 7 positions."""
    states, tokens = scored_positions(ragged_rollout())
    assert tokens.tolist() == [0, 1, 4, 8, 9, 10, 11]
    assert states.tolist() == [4, 5, 13, 22, 23, 24, 25]
    states, tokens = scored_positions(RandomTexts().batch(0))
    assert tokens.tolist() == [0, 1, *range(7, 14), *range(14, 18), 21]
    assert states.tolist() == [0, 1, *range(8, 15), *range(16, 20), 24]


def test_last_token_is_before_the_padding():
    assert last_token_positions(ragged_rollout()).tolist() == [6, 14, 26]
    assert last_token_positions(RandomTexts().batch(0)).tolist() == [2, 15, 20, 25]


def test_texts_with_left_padding_are_not_packed():
    """Two texts of 3 tokens after one token of padding."""
    mask = torch.tensor([[False, True, True, True]]).expand(2, 4)
    tokens = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    batch = TextBatch(tokens=tokens, token_mask=mask, target_mask=mask, lengths=[3, 3])
    plain = TextBatch(tokens=tokens[:, 1:], token_mask=mask[:, 1:], target_mask=mask[:, 1:])
    plain.lengths = [3, 3]
    policy = tiny()
    torch.testing.assert_close(policy.hidden_states(batch)[:, 1:], policy.hidden_states(plain))
    assert scored_positions(batch)[1].tolist() == list(range(6))


def test_packed_hidden_states_equal_padded_ones():
    policy = tiny()
    assert policy.uses_packing
    for batch in (ragged_rollout(), RandomTexts().batch(0), RandomPairs().batch(0).texts()):
        real = batch.token_mask
        expected, found = padded_hidden_states(policy.network, batch), policy.hidden_states(batch)
        torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)


def test_packed_gradients_equal_padded_ones():
    batch, grads = ragged_rollout(), []
    for packs in (True, False):
        policy = tiny()
        policy.uses_packing = packs
        policy.logprobs(batch).sum().backward()
        grads.append([weight.grad for weight in policy.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=0)

"""Texts are read one behind the other without any padding, and come back where they were."""

import torch
from harness import RandomPairs, RandomTexts, tiny

from lit_align.batches import Experience
from lit_align.models.layout import reading, real_places


def rollout() -> Experience:
    """Prompts of 3, 5 and 1 tokens, answered by 2, 1 and 4."""
    mask = torch.arange(5) >= 5 - torch.tensor([3, 5, 1]).unsqueeze(1)
    answered = torch.arange(4) < torch.tensor([2, 1, 4]).unsqueeze(1)
    ids = torch.arange(3, 30).view(3, 9)
    return Experience(
        prompts=ids[:, :5].where(mask, 0),
        prompt_mask=mask,
        prompt_lengths=[3, 5, 1],
        responses=ids[:, 5:].where(answered, 0),
        response_mask=answered,
        response_lengths=[2, 1, 4],
    )


def test_a_rollout_is_read_in_one_row():
    """16 tokens in rows of 9 places."""
    read = reading(rollout())
    texts = [range(5, 10), range(12, 18), [25, *range(26, 30)]]
    assert read.tokens.tolist() == [[token for text in texts for token in text]]
    assert read.positions.tolist() == [[*range(5), *range(6), *range(5)]]
    assert read.packed.ends.tolist() == [0, 5, 11, 16]
    assert read.back.view(3, 9).tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 4, 4],
        [5, 6, 7, 8, 9, 10, 10, 10, 10],
        [11, 11, 11, 11, 11, 12, 13, 14, 15],
    ]


def test_the_head_sees_real_tokens_alone():
    """Texts of 3, 8, 5 and 2 tokens: all but the first are scored, in rows of 7 places."""
    assert real_places(rollout()).tolist() == [0, 1, 4, 8, 9, 10, 11]
    texts = RandomTexts().batch(0)
    assert real_places(texts).tolist() == [0, 1, *range(7, 14), *range(14, 18), 21]
    assert real_places(texts.rows([1]).trim()) is None


def test_hidden_states_are_those_of_the_masked_batch():
    policy = tiny()
    assert policy.packs
    for batch in (rollout(), RandomTexts().batch(0), RandomPairs().batch(0).texts()):
        real = batch.token_mask
        expected, found = policy.masked_hidden(batch), policy.hidden(batch)
        torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_masked_batch():
    batch, grads = rollout(), []
    for read in ("hidden", "masked_hidden"):
        policy = tiny()
        policy.chosen(getattr(policy, read)(batch), batch)[0].sum().backward()
        grads.append([weight.grad for weight in policy.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=0)

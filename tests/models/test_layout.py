"""Texts are read without padding in front and without a mask, and come back where they were."""

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


def test_a_rollout_is_read_from_its_first_real_token_on():
    """The longest text has 6 tokens, the padded rows have 9."""
    (read,), _ = reading(rollout())
    assert read.tolist() == [
        [5, 6, 7, 8, 9, 0],
        [12, 13, 14, 15, 16, 17],
        [25, 26, 27, 28, 29, 29],
    ]


def test_hidden_states_are_those_of_the_masked_batch():
    policy, batch = tiny(), rollout()
    expected, found = policy.masked_hidden(batch), policy.hidden(batch)
    real = batch.token_mask
    torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)


def test_the_longer_and_the_shorter_texts_of_pairs_are_read_apart():
    """Chosen texts have 6 tokens and rejected ones 4."""
    texts = RandomPairs().batch(0).texts()
    passes, _ = reading(texts)
    assert [tokens.shape for tokens in passes] == [(4, 6), (4, 4)]
    policy, real = tiny(), texts.token_mask
    torch.testing.assert_close(
        policy.hidden(texts)[real], policy.masked_hidden(texts)[real], atol=1e-6, rtol=0
    )


def test_gradients_are_those_of_the_masked_batch():
    batch, grads = rollout(), []
    for read in ("hidden", "masked_hidden"):
        policy = tiny()
        policy.chosen(getattr(policy, read)(batch), batch)[0].sum().backward()
        grads.append([weight.grad for weight in policy.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=0)


def test_the_head_sees_real_tokens_alone():
    """Texts of 3, 8, 5 and 2 tokens: all but the first are scored, in rows of 7 places."""
    assert real_places(rollout()) == [0, 1, 4, 8, 9, 10, 11]
    texts = RandomTexts().batch(0)
    assert real_places(texts) == [0, 1, *range(7, 14), *range(14, 18), 21]
    assert real_places(texts.rows([1]).trim()) is None


def test_pairs_of_like_lengths_are_read_at_once():
    """Rejected texts of 5 tokens instead of 4 would spare a twelfth of all places: too little."""
    pairs = RandomPairs().batch(0)
    pairs.rejected_lengths = [5] * 4
    assert len(reading(pairs.texts()).passes) == 1
    assert len(reading(RandomPairs().batch(0).texts(), at_once=True).passes) == 1

"""SFT: the mean loss over all target tokens of a batch, validation and the schedule."""

import math

import pytest
import torch
from tiny_models import TINY, RandomTexts, tiny, trainer, weights
from torch.optim import SGD

from lit_align.algorithms.sft import SFT


def fit(tmp_path, **settings):
    algorithm = SFT(policy=tiny, optimizer=lambda p: SGD(p, lr=0.1), **settings)
    run = trainer(tmp_path, callbacks=[], max_epochs=1, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(algorithm, RandomTexts(2))
    return algorithm, run.callback_metrics


def test_the_loss_is_the_mean_over_target_tokens(tmp_path):
    data = RandomTexts()
    policy = tiny()
    for number in (0, 1):
        batch = data.batch(number)
        loss = torch.nn.functional.cross_entropy(
            policy.network(input_ids=batch.tokens, attention_mask=batch.token_mask.long())
            .logits[:, :-1]
            .transpose(1, 2),
            batch.tokens[:, 1:].where(batch.target_mask[:, 1:], -100),
        )
        policy.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        SGD(policy.parameters(), lr=0.1).step()
    algorithm, logged = fit(tmp_path)
    assert float(logged["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for ours, expected in zip(weights(algorithm.policy), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach())


def test_microbatches_do_not_change_the_weights(tmp_path):
    one, _ = fit(tmp_path)
    two, _ = fit(tmp_path, microbatch_tokens=8)
    for a, b in zip(weights(one.policy), weights(two.policy), strict=True):
        torch.testing.assert_close(a, b)


def test_validation_counts_each_row_once(tmp_path):
    algorithm = SFT(policy=tiny)
    run = trainer(tmp_path)
    run.callbacks.clear()
    (measured,) = run.validate(algorithm, RandomTexts(1), verbose=False)
    batch, policy = RandomTexts().batch(0).rows([0, 1, 2]), tiny()
    mask = batch.response_mask
    mean = float(-policy.logprobs(batch)[mask].mean())
    assert measured["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    hits = float(policy.top1_correct(batch)[mask].float().mean())
    assert measured["val/mean_token_accuracy"] == pytest.approx(hits)


def test_a_random_policy_starts_at_the_uniform_loss(tmp_path):
    _, logged = fit(tmp_path)
    assert float(logged["loss"]) == pytest.approx(math.log(TINY["vocab_size"]), abs=0.2)


def test_the_learning_rate_rises_and_falls(tmp_path):
    algorithm = SFT(policy=tiny, warmup_ratio=0.5, final_lr_ratio=0.1)
    run = trainer(tmp_path, max_epochs=4, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(algorithm, RandomTexts(2))
    fractions = [algorithm.lr_factor(step) for step in range(8)]
    assert fractions[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert fractions[4] == 1.0
    assert fractions[4:] == sorted(fractions[4:], reverse=True)
    assert algorithm.lr_factor(8) == pytest.approx(0.1)

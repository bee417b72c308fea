"""SPR: the weights of the responses, and an update that equals an SFT step."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import (
    Count,
    RandomOfflineResponses,
    RandomPrompts,
    distance,
    tiny,
    trainer,
    weights,
)
from torch.optim import SGD, AdamW

from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience, TextBatch
from lit_align.functional.reweighting import sample_weights


def sgd(params):
    return SGD(params, lr=0.1)


class RecordingSPR(SPR):
    """SPR that keeps the batches of its updates."""

    def prepare(self, batch):
        self.batches = [*getattr(self, "batches", []), super().prepare(batch)]
        return self.batches[-1]


def fit(folder, algorithm, data=RandomPrompts, num_batches=1, **settings):
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, **settings)
    run.fit(algorithm, data(num_batches))
    return {name: float(value) for name, value in run.callback_metrics.items()}


def response_logprobs(logprobs, batch, size):
    """Return the summed log-probs [B, G] of the responses, in nats."""
    return logprobs.double().where(batch.response_mask, 0.0).sum(-1).view(-1, size)


def test_default_settings():
    algorithm = SPR(policy=tiny)
    assert (algorithm.kl_coef, algorithm.step_kl_coef, algorithm.max_importance_ratio) == (
        0.1,
        0.2,
        2.0,
    )
    assert (algorithm.num_samples, algorithm.num_offline_samples, algorithm.update_epochs) == (
        4,
        0,
        1,
    )


def test_the_first_weights_are_a_softmax_of_the_scores(tmp_path):
    algorithm = RecordingSPR(policy=tiny, kl_coef=0.4, step_kl_coef=0.6)
    metrics = fit(tmp_path, algorithm)
    (batch,) = algorithm.batches
    assert torch.equal(batch.logprobs, batch.ref_logprobs)
    expected = batch.scores.view(-1, 4).softmax(-1)
    torch.testing.assert_close(batch.weights.view(-1, 4), expected)
    assert not batch.weights.requires_grad
    log_z = batch.scores.view(-1, 4).logsumexp(-1) - math.log(4)
    assert metrics["spr/log_z"] == pytest.approx(float(log_z.mean()), rel=1e-5)
    ess = 1 / expected.square().sum(-1) / 4
    assert metrics["spr/ess"] == pytest.approx(float(ess.mean()), rel=1e-5)


def test_later_weights_include_the_kl_penalty(tmp_path):
    algorithm = RecordingSPR(policy=tiny, optimizer=sgd)
    fit(tmp_path, algorithm, num_batches=3)
    batch = algorithm.batches[-1]
    policy = response_logprobs(batch.logprobs, batch, 4)
    reference = response_logprobs(batch.ref_logprobs, batch, 4)
    assert (policy - reference).abs().max() > 1e-2
    scores = batch.scores.double().view(-1, 4)
    expected = sample_weights(scores, policy, reference, kl_coef=0.1, step_coef=0.2)
    torch.testing.assert_close(batch.weights.double().view(-1, 4), expected, rtol=1e-6, atol=1e-7)


class WeightedSFT(SFT):
    """SFT with a weight per text."""

    def losses(self, batch):
        yield -torch.tensor(batch.weights).unsqueeze(-1) * self.policy.logprobs(batch)

    def loss_denominator(self, batch):
        return torch.tensor(4.0)  # prompts


class FixedTexts(RandomPrompts):
    """Data with one given batch of texts."""

    def batch(self, number):
        return self.texts


@pytest.mark.parametrize("microbatch_tokens", [8192, 40])
def test_the_update_is_an_sft_step_with_a_weight_per_text(tmp_path, microbatch_tokens):
    settings = {"microbatch_tokens": microbatch_tokens, "optimizer": lambda p: AdamW(p, lr=1e-2)}
    algorithm = RecordingSPR(policy=tiny, num_samples=2, num_offline_samples=2, **settings)
    metrics = fit(tmp_path, algorithm, RandomOfflineResponses)
    (batch,) = algorithm.batches
    data = FixedTexts(1)
    no_target = torch.zeros_like(batch.prompt_mask)
    data.texts = TextBatch(
        tokens=batch.tokens,
        token_mask=batch.token_mask,
        target_mask=torch.cat([no_target, batch.response_mask], 1),
        lengths=batch.lengths,
        weights=batch.weights.tolist(),
    )
    sft = WeightedSFT(policy=tiny, **settings)
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(sft, data)
    assert distance(weights(algorithm), weights(tiny())) > 1e-3
    assert all(map(torch.equal, weights(algorithm), weights(sft)))
    assert metrics["loss"] == pytest.approx(float(run.callback_metrics["loss"]), rel=1e-6)


@pytest.mark.parametrize("settings", [{"microbatch_tokens": 40}, {"microbatch_tokens": 12}])
def test_microbatches_do_not_change_the_result(tmp_path, settings):
    results = []
    for more in ({}, settings):
        algorithm = SPR(policy=tiny, num_offline_samples=2, optimizer=sgd, **more)
        fit(tmp_path, algorithm, RandomOfflineResponses, num_batches=2)
        results.append(weights(algorithm))
    assert distance(results[0], weights(tiny())) > 1e-3
    assert distance(*results) < 1e-5


def test_a_constant_added_to_all_rewards_changes_nothing(tmp_path):
    class CountPlusEight(Count):
        def __call__(self, batch):
            return super().__call__(batch) + 8

    results = []
    for reward in (Count(), CountPlusEight()):
        algorithm = SPR(policy=tiny, optimizer=sgd)
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0)
        run.callbacks[1].weighted_sum.functions["count"] = reward
        run.fit(algorithm, RandomPrompts(2))
        results.append(weights(algorithm))
    assert distance(*results) < 1e-5


def test_weights_are_constant_over_the_epochs_of_a_rollout(tmp_path):
    sums = []

    class RecordingWeights(SPR):
        def losses(self, batch):
            sums.append(batch.weights.sum())
            yield from super().losses(batch)

    fit(tmp_path, RecordingWeights(policy=tiny, update_epochs=3, optimizer=sgd))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_the_loss_denominator_counts_prompts():
    mask = torch.tensor([[True, True, False]] * 4 + [[False] * 3] * 4)
    algorithm = SPR(policy=tiny)
    rollout, minibatch = Experience(response_mask=mask), Experience(response_mask=mask[:2])
    assert algorithm.loss_denominator(rollout) == 1  # the second prompt was skipped
    assert algorithm.loss_denominator(minibatch) == 0.5  # two of its four rows


class EmptyResponses(RecordingSPR):
    """A skipped prompt, and another one with a response that is all padding."""

    def prepare(self, batch):
        rows = [row for row, group in enumerate(batch.group) if group == 0]
        batch.response_mask[[*rows, batch.group.index(1)]] = False
        return super().prepare(batch)


@pytest.mark.parametrize("data", [RandomPrompts, RandomOfflineResponses])
def test_empty_responses_and_equal_scores_give_no_nan(tmp_path, data):
    class EqualScores(Count):
        def __call__(self, batch):
            return torch.ones(len(batch))

    algorithm = EmptyResponses(
        policy=tiny, num_offline_samples=2 if data is RandomOfflineResponses else 0, optimizer=sgd
    )
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks[1].weighted_sum.functions["count"] = EqualScores()
    run.fit(algorithm, data(2))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values()))
    assert all(weight.isfinite().all() for weight in weights(algorithm))
    assert metrics["frac_reward_zero_std"] == 1.0


def test_metrics_without_offline_responses(run):
    logged = run(SPR(policy=tiny)).callback_metrics
    assert {"reward", "kl", "entropy", "loss", "grad_norm", "spr/ess", "spr/log_z"} <= set(logged)
    assert 0.25 <= logged["spr/ess"] <= 1
    constant = {"ratio_mean": 1, "ratio_max": 1, "ratio_clipped": 0, "offline_fraction": 0}
    assert {name: float(logged[f"spr/{name}"]) for name in constant} == constant


class StopAfter(Callback):
    """Saves and stops after the first epoch, as a preempted job does."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_resume_with_offline_responses_is_bitwise(tmp_path):
    def algorithm():
        settings = {"num_offline_samples": 4, "offline_half_life": 2.0, "num_samples": 2}
        return RecordingSPR(policy=tiny, optimizer=lambda p: AdamW(p, lr=1e-2), **settings)

    unbroken, first, second = algorithm(), algorithm(), algorithm()
    fit(tmp_path, unbroken, RandomOfflineResponses, 3, max_epochs=2)
    stop = StopAfter(tmp_path / "part.ckpt")
    fit(tmp_path, first, RandomOfflineResponses, 3, max_epochs=2, callbacks=[stop])
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0, max_epochs=2)
    run.fit(second, RandomOfflineResponses(3), ckpt_path=stop.path)
    assert [batch.is_offline.count(True) // 4 for batch in unbroken.batches] == [4, 3, 2, 2, 1, 1]
    assert all(map(torch.equal, weights(unbroken), weights(second)))

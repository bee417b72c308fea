"""SPR: what an answer weighs, and that the update is an SFT step."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import Count, RandomAnswers, RandomPrompts, distance, tiny, trainer, weights
from torch.optim import SGD, AdamW

from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience, TextBatch
from lit_align.functional.reweighting import sample_weights


def sgd(params):
    return SGD(params, lr=0.1)


class Kept(SPR):
    """Keeps what the updates learnt from, and how many answers were stored."""

    def prepare(self, batch):
        self.kept = [*getattr(self, "kept", []), super().prepare(batch)]
        return self.kept[-1]


def fitted(folder, algorithm, data=RandomPrompts, num_batches=1, **settings):
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, **settings)
    run.fit(algorithm, data(num_batches))
    return {name: float(value) for name, value in run.callback_metrics.items()}


def sums(logprobs, batch, size):
    return logprobs.double().where(batch.response_mask, 0.0).sum(-1).view(-1, size)


def test_defaults_are_those_of_our_notes():
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
    algorithm = Kept(policy=tiny, kl_coef=0.4, step_kl_coef=0.6)
    metrics = fitted(tmp_path, algorithm)
    (batch,) = algorithm.kept
    assert torch.equal(batch.logprobs, batch.ref_logprobs)
    expected = batch.scores.view(-1, 4).softmax(-1)
    torch.testing.assert_close(batch.weights.view(-1, 4), expected)
    assert not batch.weights.requires_grad
    log_z = batch.scores.view(-1, 4).logsumexp(-1) - math.log(4)
    assert metrics["spr/log_z"] == pytest.approx(float(log_z.mean()), rel=1e-5)
    ess = 1 / expected.square().sum(-1) / 4
    assert metrics["spr/ess"] == pytest.approx(float(ess.mean()), rel=1e-5)


def test_later_weights_charge_for_the_nats_above_the_reference(tmp_path):
    algorithm = Kept(policy=tiny, optimizer=sgd)
    fitted(tmp_path, algorithm, num_batches=3)
    batch = algorithm.kept[-1]
    given = sums(batch.logprobs, batch, 4), sums(batch.ref_logprobs, batch, 4)
    assert (given[0] - given[1]).abs().max() > 1e-2
    expected = sample_weights(batch.scores.double().view(-1, 4), *given, kl_coef=0.1, step_coef=0.2)
    torch.testing.assert_close(batch.weights.double().view(-1, 4), expected, rtol=1e-6, atol=1e-7)


class WeightedSFT(SFT):
    """SFT with one number per text."""

    def losses(self, batch):
        yield -torch.tensor(batch.weights).unsqueeze(-1) * self.policy.logprobs(batch)

    def loss_denominator(self, batch):
        return torch.tensor(4.0)  # prompts


class Given(RandomPrompts):
    """One batch of texts with their weights."""

    def batch(self, number):
        return self.texts


@pytest.mark.parametrize("microbatch_tokens", [8192, 40])
def test_the_update_is_an_sft_step_with_a_number_per_text(tmp_path, microbatch_tokens):
    settings = {"microbatch_tokens": microbatch_tokens, "optimizer": lambda p: AdamW(p, lr=1e-2)}
    algorithm = Kept(policy=tiny, num_samples=2, num_offline_samples=2, **settings)
    metrics = fitted(tmp_path, algorithm, RandomAnswers)
    (batch,) = algorithm.kept
    data = Given(1)
    not_learnt = torch.zeros_like(batch.prompt_mask)
    data.texts = TextBatch(
        tokens=batch.tokens,
        token_mask=batch.token_mask,
        target_mask=torch.cat([not_learnt, batch.response_mask], 1),
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
def test_micro_batches_do_not_change_the_result(tmp_path, settings):
    results = []
    for more in ({}, settings):
        algorithm = SPR(policy=tiny, num_offline_samples=2, optimizer=sgd, **more)
        fitted(tmp_path, algorithm, RandomAnswers, num_batches=2)
        results.append(weights(algorithm))
    assert distance(results[0], weights(tiny())) > 1e-3
    assert distance(*results) < 1e-5


def test_a_constant_added_to_all_rewards_changes_nothing(tmp_path):
    class More(Count):
        def __call__(self, batch):
            return super().__call__(batch) + 8

    learnt = []
    for reward in (Count(), More()):
        algorithm = SPR(policy=tiny, optimizer=sgd)
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0)
        run.callbacks[1].weighted_sum.functions["count"] = reward
        run.fit(algorithm, RandomPrompts(2))
        learnt.append(weights(algorithm))
    assert distance(*learnt) < 1e-5


def test_weights_stay_what_they_were_at_the_collection(tmp_path):
    seen = []

    class Watching(SPR):
        def losses(self, batch):
            seen.append(batch.weights.sum())
            yield from super().losses(batch)

    fitted(tmp_path, Watching(policy=tiny, update_epochs=3, optimizer=sgd))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_loss_counts_prompts():
    mask = torch.tensor([[True, True, False]] * 4 + [[False] * 3] * 4)
    algorithm = SPR(policy=tiny)
    assert (
        algorithm.loss_denominator(Experience(response_mask=mask)) == 1
    )  # the second prompt was skipped
    assert (
        algorithm.loss_denominator(Experience(response_mask=mask[:2])) == 0.5
    )  # a minibatch of its rows


class Emptied(Kept):
    """A prompt was skipped, and one answer of another is all padding."""

    def prepare(self, batch):
        rows = [row for row, group in enumerate(batch.group) if group == 0]
        batch.response_mask[[*rows, batch.group.index(1)]] = False
        return super().prepare(batch)


@pytest.mark.parametrize("data", [RandomPrompts, RandomAnswers])
def test_empty_answers_and_equal_scores_give_no_nan(tmp_path, data):
    class Same(Count):
        def __call__(self, batch):
            return torch.ones(len(batch))

    algorithm = Emptied(
        policy=tiny, num_offline_samples=2 if data is RandomAnswers else 0, optimizer=sgd
    )
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks[1].weighted_sum.functions["count"] = Same()
    run.fit(algorithm, data(2))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values()))
    assert all(weight.isfinite().all() for weight in weights(algorithm))
    assert metrics["frac_reward_zero_std"] == 1.0


def test_metrics_of_samples_alone(run):
    logged = run(SPR(policy=tiny)).callback_metrics
    assert {"reward", "kl", "entropy", "loss", "grad_norm", "spr/ess", "spr/log_z"} <= set(logged)
    assert 0.25 <= logged["spr/ess"] <= 1
    constant = {"ratio_mean": 1, "ratio_max": 1, "ratio_clipped": 0, "offline_fraction": 0}
    assert {name: float(logged[f"spr/{name}"]) for name in constant} == constant


class StopAfter(Callback):
    """Saves and leaves after the first epoch, as a preempted job does."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_resuming_with_stored_answers_is_bitwise(tmp_path, monkeypatch):
    def algorithm():
        settings = {"num_offline_samples": 4, "offline_half_life": 2.0, "num_samples": 2}
        return Kept(policy=tiny, optimizer=lambda p: AdamW(p, lr=1e-2), **settings)

    whole, first, second = algorithm(), algorithm(), algorithm()
    fitted(tmp_path, whole, RandomAnswers, 3, max_epochs=2)
    stop = StopAfter(tmp_path / "part.ckpt")
    fitted(tmp_path, first, RandomAnswers, 3, max_epochs=2, callbacks=[stop])
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0, max_epochs=2)
    run.fit(second, RandomAnswers(3), ckpt_path=stop.path)
    assert [batch.is_offline.count(True) // 4 for batch in whole.kept] == [4, 3, 2, 2, 1, 1]
    assert all(map(torch.equal, weights(whole), weights(second)))

"""DPO and IPO: losses against naive code, and log-probs of the reference."""

import math
from functools import partial

import pytest
import torch
from tiny_models import TINY, WORDS, RandomPairs, tiny, trainer, weights
from torch.optim import SGD, AdamW

from lit_align.algorithms.core.precomputed_logprobs import rank_batches
from lit_align.algorithms.dpo import DPO, IPO
from lit_align.data.preferences import PreferenceData
from lit_align.errors import UserError
from lit_align.models.adapters.lora import LoRA
from lit_align.models.policy import Policy

LORA = LoRA(r=2, lora_alpha=4)


def adam(params):
    return AdamW(params, lr=1e-2)


def fit(folder, algorithm, data, ckpt_path=None, **settings):
    """Train without rollouts and return the trainer, which has the metrics."""
    torch.manual_seed(0)
    run = trainer(folder, **{"limit_val_batches": 0, **settings})
    run.callbacks.clear()
    run.fit(algorithm, data, ckpt_path=ckpt_path)
    return run


def naive_sums(policy, tokens, lengths, masks):
    """Return the log-probs [B] of the responses, row by row without padding, from all logits."""
    rows = []
    for row, length, mask in zip(tokens, lengths, masks, strict=True):
        logits = policy.network(input_ids=row[None, :length]).logits[0]
        own = logits[:-1].log_softmax(-1).gather(-1, row[1:length, None]).squeeze(-1)
        rows.append((own * mask[1:length]).sum())
    return torch.stack(rows)


def naive_margin(policy, reference, pairs):
    """Return the difference [B] of the log-ratios of chosen and rejected responses, in nats."""
    sides = [
        naive_sums(policy, tokens, lengths, mask) - naive_sums(reference, tokens, lengths, mask)
        for tokens, lengths, mask in (
            (pairs.chosen, pairs.chosen_lengths, pairs.chosen_target_mask),
            (pairs.rejected, pairs.rejected_lengths, pairs.rejected_target_mask),
        )
    ]
    return sides[0] - sides[1]


def sigmoid_loss(margin, beta, smoothing):
    """Return the loss of arXiv:2305.18290 eq. 7, with a fraction of flipped labels."""
    right = 1 / (1 + (-beta * margin).exp())
    return -((1 - smoothing) * right.log() + smoothing * (1 - right).log())


def squared_loss(margin, beta, smoothing):
    """Return the loss of arXiv:2310.12036 eq. 17, with a fraction of flipped labels."""
    target = 1 / (2 * beta)
    return (1 - smoothing) * (margin - target) ** 2 + smoothing * (-margin - target) ** 2


def other():
    """Return a policy with other weights than `tiny`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Policy(config=dict(TINY))


@pytest.mark.parametrize(("kind", "loss"), [(DPO, sigmoid_loss), (IPO, squared_loss)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("microbatch_tokens", [1, 1000])
def test_a_step_equals_naive_code(tmp_path, kind, loss, smoothing, microbatch_tokens):
    algorithm = kind(
        policy=tiny,
        reference=other,
        beta=0.5,
        label_smoothing=smoothing,
        microbatch_tokens=microbatch_tokens,
        max_grad_norm=1e9,
        optimizer=lambda params: SGD(params, lr=0.01),
    )
    run = fit(tmp_path, algorithm, RandomPairs(1))
    policy, pairs = tiny(), RandomPairs().batch(0)
    with torch.no_grad():
        reference = other()
    expected = loss(naive_margin(policy, reference, pairs), 0.5, smoothing).mean()
    expected.backward()
    assert float(run.callback_metrics["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    start = weights(tiny())
    for new, old, weight in zip(weights(algorithm.policy), start, policy.parameters(), strict=True):
        torch.testing.assert_close((old - new) / 0.01, weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_the_first_loss_is_log_2(tmp_path, precision, lora):
    algorithm = DPO(policy=partial(tiny, lora=lora), microbatch_tokens=24)
    run = fit(tmp_path, algorithm, RandomPairs(1), precision=precision)
    assert run.callback_metrics["loss"] == torch.tensor(math.log(2))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert run.callback_metrics[name] == 0
    assert run.callback_metrics["rewards/accuracies"] == 0.5


class FixedPolicy:
    """A policy with constant log-probs of chosen and rejected responses, in turn."""

    def __init__(self, *sums: float):
        self.sums = sums

    def logprobs(self, texts):
        rows = torch.tensor(self.sums).repeat(len(texts) // len(self.sums))
        return texts.response_mask * rows[:, None] / texts.response_mask.sum(-1, keepdim=True)


def loss_of(kind, policy, reference, **settings):
    """Return loss and metrics of one pair with these log-probs under policy and reference."""
    algorithm = kind(policy=tiny, **settings)
    algorithm.__dict__["policy"] = FixedPolicy(*policy)
    pairs = RandomPairs().batch(0).rows([0])
    pairs.ref_chosen, pairs.ref_rejected = torch.tensor(reference).view(2, 1)
    (loss,) = algorithm.losses(pairs)
    sums = algorithm.metrics.sums.items()
    return loss.tolist(), {name: float(total) for name, (total, _) in sums}


def test_losses_and_metrics_by_hand():
    """Log-ratios of 1 and -1 nats give rewards of 0.5 and -0.5 at beta 0.5, so a margin of 1."""
    sides = {"policy": (-2.0, -5.0), "reference": (-3.0, -4.0), "beta": 0.5}
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    loss, metrics = loss_of(DPO, **sides)
    assert loss == pytest.approx([win])
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.5,
            "rewards/accuracies": 1.0,
            "rewards/margins": 1.0,
            "logps/chosen": -2.0,
            "logps/rejected": -5.0,
        }
    )
    assert loss_of(DPO, **sides, label_smoothing=0.25)[0] == pytest.approx(
        [0.75 * win + 0.25 * lose]
    )
    assert loss_of(IPO, **sides)[0] == pytest.approx([(2 - 1) ** 2])
    assert loss_of(IPO, **sides, label_smoothing=0.25)[0] == pytest.approx([0.75 + 0.25 * 3**2])


def test_ipo_converges_to_its_target_and_dpo_does_not(tmp_path):
    """The target 1 / (2 beta) nats is a margin of 1/2. Smoothing s lowers it to (1 - 2s) / 2."""

    def margin(kind, **settings):
        algorithm = kind(
            policy=tiny, optimizer=lambda p: AdamW(p, lr=2e-3), final_lr_ratio=0.0, **settings
        )
        run = fit(tmp_path, algorithm, RandomPairs(1), max_epochs=60)
        return float(run.callback_metrics["rewards/margins"])

    assert margin(IPO) == pytest.approx(0.5, abs=1e-3)
    assert margin(IPO, label_smoothing=0.25) == pytest.approx(0.25, abs=1e-3)
    assert margin(DPO) > 1


def test_empty_responses_give_no_nan(tmp_path):
    class EmptyResponses(RandomPairs):
        def batch(self, number):
            pairs = super().batch(number)
            pairs.chosen_target_mask, pairs.rejected_target_mask = (
                mask.clone() for mask in (pairs.chosen_target_mask, pairs.rejected_target_mask)
            )
            pairs.chosen_target_mask[:2] = False
            pairs.rejected_target_mask[1:3] = False
            return pairs

    algorithm = DPO(policy=tiny, optimizer=adam)
    run = fit(tmp_path, algorithm, EmptyResponses(2), max_epochs=2)
    assert all(weight.isfinite().all() for weight in weights(algorithm.policy))
    assert all(value.isfinite() for value in run.callback_metrics.values())
    pairs = algorithm.prepare(EmptyResponses().batch(0))
    loss = next(algorithm.losses(pairs)).tolist()
    assert loss[1] == pytest.approx(math.log(2))
    assert loss[3] != pytest.approx(math.log(2), abs=1e-3)


def test_the_reference_is_constant_and_not_in_checkpoints(tmp_path):
    algorithm = DPO(policy=tiny, optimizer=adam)
    fit(tmp_path, algorithm, RandomPairs(3)).save_checkpoint(tmp_path / "dpo.ckpt")
    for frozen, start in zip(algorithm.reference.parameters(), tiny().parameters(), strict=True):
        assert torch.equal(frozen, start)
        assert not frozen.requires_grad
    state = torch.load(tmp_path / "dpo.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"policy.{name}" for name in tiny().state_dict()}


def test_a_disabled_adapter_equals_a_separate_reference(tmp_path):
    shared = DPO(policy=partial(tiny, lora=LORA), optimizer=adam)
    separate = DPO(policy=partial(tiny, lora=LORA), reference=tiny, optimizer=adam)
    runs = [fit(tmp_path, algorithm, RandomPairs(3)) for algorithm in (shared, separate)]
    assert "reference" not in shared._modules
    assert "reference" in separate._modules
    for one, two, start in zip(
        weights(shared.policy), weights(separate.policy), weights(tiny(lora=LORA)), strict=True
    ):
        assert torch.equal(one, two)
        assert not torch.equal(one, start)
    assert runs[0].callback_metrics == runs[1].callback_metrics


def test_validation_counts_each_pair_once(tmp_path):
    algorithm = DPO(policy=tiny, reference=other, beta=0.5)
    run = trainer(tmp_path)
    run.callbacks.clear()
    (measured,) = run.validate(algorithm, RandomPairs(1), verbose=False)
    pairs = RandomPairs().batch(0).rows([0, 1, 2])
    with torch.no_grad():
        margin = naive_margin(tiny(), other(), pairs)
    assert measured["val/loss"] == pytest.approx(
        float(sigmoid_loss(margin, 0.5, 0).mean()), rel=1e-5
    )
    assert measured["val/margin"] == pytest.approx(float(0.5 * margin.mean()), rel=1e-4)
    assert measured["val/accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    assert measured["val/margin"] == pytest.approx(
        measured["val/rewards/chosen"] - measured["val/rewards/rejected"], rel=1e-4
    )


# Precomputed log-probs of the reference -----------------------------------------------------------


small = partial(tiny, config=WORDS)


def toy(**settings):
    more = {"tokenizer": "toy", "batch_size": 4, "max_rows": 18, "eval_split": "test"}
    return PreferenceData("toy", **{**more, **settings})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_precomputed_log_probs_give_bitwise_equal_runs(tmp_path, lora):
    """Each pair is a micro-batch, since other batch sizes round differently."""
    algorithms, metrics = [], []
    for precompute in (False, True):
        algorithm = DPO(
            policy=partial(small, lora=lora),
            precompute=precompute,
            microbatch_tokens=1,
            optimizer=adam,
        )
        run = fit(tmp_path, algorithm, toy(), max_epochs=2, limit_val_batches=2)
        algorithms.append(algorithm)
        metrics.append(run.callback_metrics)
    computed, precomputed = algorithms
    assert len(precomputed.precomputed) == 18 + 18
    assert "reference" not in precomputed._modules
    assert [role.name for role in precomputed.all_roles()] == ["policy"]
    for one, two in zip(weights(computed.policy), weights(precomputed.policy), strict=True):
        assert torch.equal(one, two)
    assert metrics[0] == metrics[1]
    assert metrics[0]["rewards/margins"] != 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precomputed_log_probs_have_the_precision_of_training(tmp_path, precision):
    algorithm = DPO(policy=small, precompute=True, microbatch_tokens=1)
    run = fit(tmp_path, algorithm, toy(max_rows=4), precision=precision)
    assert run.callback_metrics["loss"] == torch.tensor(math.log(2))


def test_before_the_first_step_the_policy_is_the_reference(tmp_path):
    algorithm = DPO(policy=small, precompute=True, optimizer=adam)
    losses = []
    algorithm.on_validation_epoch_end = lambda: losses.append(
        float(algorithm.metrics.compute_eval()["loss"])
    )
    fit(tmp_path, algorithm, toy(), limit_val_batches=1, num_sanity_val_steps=1)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_have_all_rows_in_equal_numbers_of_batches(ranks):
    loader = toy(max_rows=7, batch_size=2).train_dataloader()
    everything = {pair.fingerprint for pair in loader.dataset.examples}
    assert len(everything) == 7
    parts = [list(rank_batches(loader, rank, ranks)) for rank in range(ranks)]
    seen = [[pair for batch in part for pair in batch.fingerprints] for part in parts]
    assert set().union(*seen) == everything
    assert [len(part) for part in seen] == [-(-7 // ranks)] * ranks
    assert len({len(part) for part in parts}) == 1


@pytest.fixture
def saved(tmp_path):
    """Return a function that trains on toy pairs and returns the trainer and its checkpoint."""

    def train(**settings):
        run = fit(tmp_path, DPO(policy=small, optimizer=adam, **settings), toy())
        run.save_checkpoint(tmp_path / "dpo.ckpt")
        return run, tmp_path / "dpo.ckpt"

    return train


def test_a_checkpoint_restores_the_precomputed_log_probs(tmp_path):
    """The validation of a checkpoint has the margin that a reference model gives."""
    margins = []
    for precompute in (True, False):
        algorithm = DPO(policy=small, precompute=precompute, optimizer=adam)
        fit(tmp_path, algorithm, toy(), limit_val_batches=1).save_checkpoint(tmp_path / "dpo.ckpt")
        again = DPO(policy=small, precompute=precompute)
        run = trainer(tmp_path)
        run.callbacks.clear()
        run.validate(again, toy(), ckpt_path=tmp_path / "dpo.ckpt", verbose=False)
        margins.append(float(run.callback_metrics["val/margin"]))
    assert margins[0] == pytest.approx(margins[1], rel=1e-5)
    assert margins[0] != 0


def test_data_without_precomputed_log_probs_are_refused(tmp_path, saved):
    _, path = saved(precompute=True)
    again = DPO(policy=small, precompute=True)
    with pytest.raises(UserError, match="4 pairs of a batch have no precomputed reference"):
        fit(tmp_path, again, toy(max_tokens=20), max_epochs=2, ckpt_path=path)


def test_a_checkpoint_without_precompute_is_refused_with_precompute(tmp_path, saved):
    _, path = saved(precompute=False)
    again = DPO(policy=small, precompute=True)
    with pytest.raises(UserError, match=r"without precompute, .* Set --model.precompute false"):
        fit(tmp_path, again, toy(), max_epochs=2, ckpt_path=path)


def test_a_checkpoint_with_precompute_is_refused_without_precompute(tmp_path, saved):
    _, path = saved(precompute=True)
    with pytest.raises(UserError, match=r"with precompute. Set --model.precompute true"):
        fit(tmp_path, DPO(policy=small), toy(), max_epochs=2, ckpt_path=path)


def test_other_data_are_evaluated_without_precompute(tmp_path, saved):
    _, path = saved(precompute=True)
    run = trainer(tmp_path)
    run.callbacks.clear()
    other = toy(max_tokens=20)
    with pytest.raises(UserError, match=r"To evaluate other data, set --model.precompute"):
        run.validate(DPO(policy=small, precompute=True), other, ckpt_path=path, verbose=False)
    (measured,) = run.validate(DPO(policy=small), other, ckpt_path=path, verbose=False)
    assert measured["val/margin"] != 0


def test_precompute_needs_a_data_module(tmp_path):
    with pytest.raises(UserError, match="needs a data module, found a data loader"):
        fit(tmp_path, DPO(policy=small, precompute=True), toy().train_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0, found 0.0. Set --model.beta"),
        ({"beta": math.nan}, "beta must be above 0, found nan"),
        (
            {"label_smoothing": 0.5},
            "at least 0 and below 0.5, found 0.5. Set --model.label",
        ),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"precompute": True, "reference": tiny}, "Remove --model.reference or"),
    ],
)
@pytest.mark.parametrize("kind", [DPO, IPO])
def test_invalid_settings_are_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(policy=tiny, **settings)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    algorithm = DPO(policy=tiny, reference=small)
    with pytest.raises(UserError, match=r"has 192 tokens .* the policy .* has 32. Set"):
        fit(tmp_path, algorithm, RandomPairs(1))

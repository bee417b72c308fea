"""ReMax: advantages by hand, the loss denominator, resume and checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import TINY, RandomPrompts, distance, tiny, trainer, weights
from torch.optim import SGD, AdamW

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.models.policy import Policy

LOGPROBS, REFERENCE = [-0.4, -0.8, -0.2, 0.0], [-0.5, -0.6, -0.2, 0.0]


def one_row() -> Experience:
    """Return one response of three tokens and a padding position."""
    return Experience(
        logprobs=torch.tensor([LOGPROBS], dtype=torch.float64),
        ref_logprobs=torch.tensor([REFERENCE], dtype=torch.float64),
        response_mask=torch.tensor([[True, True, True, False]]),
    )


def advantages(score=2.1, greedy=1.4, **settings) -> list[float]:
    """Return the token advantages of a response with this score and greedy score."""
    algorithm = ReMax(policy=tiny, **settings)
    advantage = torch.tensor([score - greedy], dtype=torch.float64)
    return algorithm.token_advantages(one_row(), advantage)[0].tolist()


def test_the_kl_penalty_of_a_token_is_subtracted():
    assert advantages(kl_coef=0.1) == pytest.approx([0.69, 0.72, 0.70, 0.0])


def test_kl_to_go_subtracts_the_penalty_of_later_tokens_too():
    assert advantages(kl_coef=0.1, kl_to_go=True) == pytest.approx([0.71, 0.72, 0.70, 0.0])


def test_gamma_also_discounts_the_last_token():
    expected = [0.6742093, 0.69607, 0.693, 0.0]
    assert advantages(kl_coef=0.05, gamma=0.99) == pytest.approx(expected)


def test_the_advantage_is_clipped_after_the_baseline_is_subtracted():
    clipped = advantages(score=20.0, greedy=1.0, kl_coef=0.0, advantage_clip=5.0)
    assert clipped == pytest.approx([5.0, 5.0, 5.0, 0.0])
    shifted = advantages(score=20.0, greedy=19.3, kl_coef=0.0, advantage_clip=5.0)
    assert shifted == pytest.approx([0.7, 0.7, 0.7, 0.0])


def test_a_constant_added_to_all_rewards_changes_nothing():
    assert advantages(score=102.1, greedy=101.4) == pytest.approx(advantages())


def test_default_settings_are_those_of_the_paper():
    algorithm = ReMax(policy=tiny)
    assert (algorithm.kl_coef, algorithm.kl_to_go, algorithm.gamma) == (0.1, False, 1.0)
    assert (algorithm.num_samples, algorithm.advantage_clip) == (1, None)
    assert algorithm.loss_aggregation == "sequence_sum"


def test_the_loss_denominator_counts_responses_or_tokens():
    batch = Experience(response_mask=torch.tensor([[True, True, False], [False] * 3]))
    assert ReMax(policy=tiny).loss_denominator(batch) == 1  # the second prompt was skipped
    assert ReMax(policy=tiny, loss_aggregation="token_mean").loss_denominator(batch) == 2


def test_more_than_one_step_per_rollout_is_refused():
    with pytest.raises(UserError, match="no importance ratio, found update_epochs 2"):
        ReMax(policy=tiny, update_epochs=2)


class RecordingReMax(ReMax):
    """ReMax that keeps the prepared batches."""

    def prepare(self, batch):
        batch = super().prepare(batch)
        self.batches = [*getattr(self, "batches", []), batch]
        return batch


def test_the_kl_is_zero_at_the_first_step(run):
    algorithm = RecordingReMax(policy=tiny)
    run(algorithm, num_batches=1)
    (batch,) = algorithm.batches
    assert torch.equal(batch.logprobs, batch.ref_logprobs)


def test_only_sampled_rows_train(run):
    algorithm = RecordingReMax(policy=tiny, num_samples=3)
    run(algorithm, num_batches=1)
    (batch,) = algorithm.batches
    assert len(batch) == 12
    assert batch.group == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not any(batch.is_greedy)


@pytest.mark.parametrize("microbatch_tokens", [12, 40])
def test_microbatches_do_not_change_the_result(run, microbatch_tokens):
    results = []
    for size in (8192, microbatch_tokens):
        algorithm = ReMax(
            policy=tiny, num_samples=2, microbatch_tokens=size, optimizer=lambda p: SGD(p, lr=0.1)
        )
        run(algorithm, num_batches=2)
        results.append(weights(algorithm))
    assert distance(results[0], weights(tiny())) > 1e-3
    assert distance(*results) < 1e-5


def test_equal_seeds_give_bitwise_equal_weights(run):
    one, two = ReMax(policy=tiny), ReMax(policy=tiny)
    run(one)
    run(two)
    assert all(map(torch.equal, weights(one), weights(two)))


class StopAfter(Callback):
    """Saves and stops after some epochs, as a preempted job does."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_resume_is_bitwise(tmp_path, stop_at):
    def algorithm():
        return ReMax(
            policy=tiny, optimizer=lambda p: AdamW(p, lr=1e-2), warmup_ratio=0.4, final_lr_ratio=0.1
        )

    unbroken, first, second = algorithm(), algorithm(), algorithm()
    torch.manual_seed(0)
    trainer(tmp_path, max_epochs=3).fit(unbroken, RandomPrompts())
    stop = StopAfter(stop_at, tmp_path / "part.ckpt")
    trainer(tmp_path, max_epochs=3, callbacks=[stop]).fit(first, RandomPrompts())
    trainer(tmp_path, max_epochs=3).fit(second, RandomPrompts(), ckpt_path=stop.path)
    assert (first.iteration, second.iteration) == (3 * stop_at, 9)
    assert all(map(torch.equal, weights(unbroken), weights(second)))


def test_a_checkpoint_has_the_trained_weights_and_loads_with_weights_only(run, tmp_path):
    algorithm = ReMax(policy=tiny)
    run(algorithm).save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["iteration"] == 3
    assert checkpoint["state_dict"]
    assert all(name.startswith("policy.") for name in checkpoint["state_dict"])


def test_a_checkpoint_of_other_weights_is_refused(run):
    algorithm = ReMax(policy=tiny)
    run(algorithm)
    start = {"iteration": 1, "algorithm": "ReMax", "frozen_fingerprint": 0.0}
    with pytest.raises(UserError, match="does not fit this model: 22 weights are unknown"):
        algorithm.on_load_checkpoint({**start, "state_dict": {"other": torch.ones(1)}})
    shapes = {name: weight[:1] for name, weight in algorithm.state_dict().items()}
    with pytest.raises(UserError, match="weights are unknown, missing or of another shape"):
        algorithm.on_load_checkpoint({**start, "state_dict": shapes})


def test_another_reference_is_refused(tmp_path, run):
    run(ReMax(policy=tiny)).save_checkpoint(tmp_path / "remax.ckpt")
    other = ReMax(policy=lambda: Policy(config=dict(TINY)))
    with pytest.raises(UserError, match="The reference or another frozen base has other weights"):
        trainer(tmp_path).fit(other, RandomPrompts(), ckpt_path=tmp_path / "remax.ckpt")


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path, run):
    run(ReMax(policy=tiny)).save_checkpoint(tmp_path / "remax.ckpt")
    with pytest.raises(UserError, match="trained with ReMax and cannot resume with GRPO"):
        trainer(tmp_path).fit(
            GRPO(policy=tiny, num_samples=2), RandomPrompts(), ckpt_path=tmp_path / "remax.ckpt"
        )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_runs_accumulate_metrics_in_float32(tmp_path, precision):
    algorithm = ReMax(policy=tiny)
    tool = trainer(tmp_path, precision=precision)
    tool.fit(algorithm, RandomPrompts())
    assert tool.callback_metrics["sampling/sampling_logp_difference/mean"] < 0.02
    means = {"value": (torch.ones(1000).cumsum(0) > 500, torch.ones(1000, dtype=torch.bool))}
    for _ in range(2):
        algorithm.metrics.add_eval(Experience(is_new=[True] * 1000), **means)
    assert float(algorithm.metrics.compute_eval()["value"]) == 0.5


def test_fp16_with_a_loss_scale_is_refused(tmp_path):
    algorithm = ReMax(policy=tiny)
    algorithm.trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(UserError, match=r"Set --trainer.precision bf16-mixed"):
        algorithm.setup("fit")


def test_activation_checkpointing_runs_each_block_twice(tiny_policy, prompts):
    calls = []

    def count_calls(policy):
        calls.clear()
        policy.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        batch = prompts.repeat_interleave(1)
        batch.responses = batch.prompts
        batch.response_mask, batch.response_lengths = batch.prompt_mask, [5] * 4
        policy.logprobs(batch).sum().backward()
        return len(calls)

    assert count_calls(tiny_policy) == 1
    assert count_calls(tiny(activation_checkpointing=True)) == 2


def test_validation_logs_means_of_greedy_responses(tmp_path):
    algorithm = ReMax(policy=tiny)
    tool = trainer(tmp_path)
    (measured,) = tool.validate(algorithm, RandomPrompts(), verbose=False)
    assert set(measured) >= {
        "val/reward",
        "val/kl/per_response_k1",
        "val/mean_length",
        "val/clipped_ratio",
    }
    assert measured["val/kl/per_response_k1"] == 0.0


def test_metrics_have_the_names_of_trl(run):
    logged = run(ReMax(policy=tiny)).callback_metrics
    names = (
        "reward reward_std kl kl/per_response_k1 entropy completions/mean_length loss grad_norm lr"
    )
    assert set(names.split()) <= set(logged)
    assert logged["sampling/sampling_logp_difference/mean"] < 1e-4

"""Hydra: the joint loss of Hydra-SFT, updates of one backbone, equality with separate models."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_models import TINY, RandomPairs, RandomPrompts, trained, trainer
from torch import Tensor
from torch.optim import SGD

from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.hydra_sft import HydraSFT
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.batches import PreferenceBatch
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.errors import UserError
from lit_align.functional.losses import bradley_terry
from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import ACTOR, CRITIC, Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.base import RewardError
from lit_align.rewards.shared_backbone import SharedBackboneReward


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("two_headed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PolicyWithRewardHead(config=dict(TINY)).save(folder)
    return str(folder)


def sgd(params):
    return SGD(params, lr=0.1)


def seeded(kind, *args, **settings):
    """Return a network with the same random adapters each time."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind(*args, lora=LoRA(r=4, lora_alpha=8), **settings)


def fit_with_base_rewards(folder, algorithm, num_batches: int = 2) -> Trainer:
    """Train with the scores of the frozen base and return the trainer."""
    torch.manual_seed(0)
    done = trainer(folder, limit_val_batches=0)
    done.callbacks[1:2] = [Reward(SharedBackboneReward())]
    done.fit(algorithm, RandomPrompts(num_batches))
    return done


# Hydra-SFT ---------------------------------------------------------------------------------------


class FixedOutputs:
    """A language model with reward head: logits [[2,0,0],[0,1,0]], scores 1 and 0.2."""

    def score_pairs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([[2.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor([[0], [1]])).T
        return logprobs, torch.tensor([[1.0, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize(("reward_loss_coef", "expected"), [(0.1, 0.4326048), (1.0, 0.7665954)])
def test_the_joint_loss_by_hand(reward_loss_coef, expected):
    algorithm = HydraSFT(policy=lambda: None, reward_loss_coef=reward_loss_coef)
    algorithm.__dict__["policy"] = FixedOutputs()
    batch = PreferenceBatch(
        chosen_target_mask=torch.tensor([[False, True, True]]),
        margin=torch.zeros(1),
        token_weights=torch.tensor([0.5]),
    )
    (loss,) = algorithm.losses(batch)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_chosen_score_by_hand():
    better = torch.tensor(1.0, requires_grad=True)
    bradley_terry(better, torch.tensor(0.2)).backward()
    assert float(better.grad) == pytest.approx(-0.3100255, abs=1e-6)


def test_the_mean_loss_over_diverging_tokens_by_hand():
    """The published code averages from the first token that differs. We use the last token."""
    chosen, rejected = torch.tensor([0.5, 1, 1.5]), torch.tensor([0.5, 0.2, 0.1])
    assert float(bradley_terry(chosen, rejected).mean()) == pytest.approx(0.4282218, abs=1e-6)


def test_language_loss_is_a_mean_over_tokens_and_reward_loss_over_pairs(tmp_path, base):
    """The loss of any micro-batches equals that of one pass over the batch."""
    data = RandomPairs(1)
    batch, start = data.batch(0), PolicyWithRewardHead(base)
    with torch.no_grad():
        logprobs, scores = start.score_pairs(batch)
    language = -logprobs.sum() / batch.chosen_target_mask[:, 1:].sum()
    expected = language + 0.5 * bradley_terry(*scores.unbind(-1)).mean()
    for budget in (8192, 12):
        torch.manual_seed(0)
        algorithm = HydraSFT(
            policy=lambda: PolicyWithRewardHead(base),
            reward_loss_coef=0.5,
            optimizer=sgd,
            microbatch_tokens=budget,
        )
        done = trainer(tmp_path, limit_val_batches=1)
        done.callbacks.clear()
        done.fit(algorithm, RandomPairs(1))
        metrics = {name: float(value) for name, value in done.callback_metrics.items()}
        assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert metrics["language_loss"] == pytest.approx(float(language), rel=1e-5)
        assert metrics["val/language_loss"] < metrics["language_loss"]
        assert 0 <= metrics["val/accuracy"] <= 1


# Hydra-PPO ---------------------------------------------------------------------------------------


def test_only_adapters_and_value_head_train(tmp_path, base):
    algorithm = HydraPPO(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    fit_with_base_rewards(tmp_path, algorithm)
    start, end = (
        dict(n.network.named_parameters()) for n in (seeded(Hydra, base), algorithm.policy)
    )
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert {ACTOR, CRITIC} == {word for name in moved for word in (ACTOR, CRITIC) if word in name}
    assert "score.modules_to_save.critic.weight" in moved
    assert all(".lora_" in name or "modules_to_save" in name for name in moved)


def test_reference_and_reward_model_are_constant_in_training(tmp_path, base):
    errors = []

    class RecordingHydra(HydraPPO):
        def prepare(self, batch):
            batch = super().prepare(batch)
            expected = Policy(base).logprobs(batch)
            errors.append(float((batch.ref_logprobs - expected).abs().max()))
            errors.append(float((batch.scores - ScalarHead(base).scores(batch)).abs().max()))
            return batch

    algorithm = RecordingHydra(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    done = fit_with_base_rewards(tmp_path, algorithm, 3)
    assert max(errors) < 1e-5
    assert len(errors) == 6
    assert float(done.callback_metrics["kl/per_response_k1"]) != 0.0


def test_the_first_rollout_has_kl_0_and_values_of_the_reward_head(tmp_path, base):
    class RecordingHydra(HydraPPO):
        def prepare(self, batch):
            self.batch = super().prepare(batch)
            return self.batch

    algorithm = RecordingHydra(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    done = fit_with_base_rewards(tmp_path, algorithm, num_batches=1)
    batch = algorithm.batch
    assert float(done.callback_metrics["kl/per_response_k1"]) == 0.0
    assert torch.allclose(batch.values, ScalarHead(base).state_values(batch), atol=1e-5)


def test_hydra_equals_separate_models_with_equal_adapters(tmp_path, base):
    """Actor, critic, reward model and reference are equal on one backbone and on two."""

    def seeded_policy():
        with torch.random.fork_rng():  # Hydra draws the actor's adapter, then the critic's
            torch.manual_seed(2)
            return Policy(base, lora=LoRA(r=4, lora_alpha=8))

    settings = {"optimizer": sgd, "score_clip": 5.0, "whiten_advantages": False, "kl_coef": 0.02}
    separate = PPO(
        policy=seeded_policy,
        critic=lambda: seeded(ScalarHead, base),
        reference=lambda: Policy(base),
        **settings,
    )
    hydra = HydraPPO(policy=lambda: seeded(Hydra, base), **settings)
    runs = [
        fit_with_base_rewards(tmp_path, algorithm, num_batches=1) for algorithm in (separate, hydra)
    ]
    metrics = [{k: float(v) for k, v in run.callback_metrics.items()} for run in runs]
    for name in ("reward", "loss/policy_avg", "kl/per_response_k1"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6), name
    assert metrics[1]["loss/value_avg"] == pytest.approx(metrics[0]["loss/value_avg"], rel=1e-5)
    assert metrics[1]["grad_norm/policy"] == pytest.approx(metrics[0]["grad_norm/policy"], rel=1e-4)


def test_the_gradient_of_a_joint_adapter_is_the_sum_of_both(tmp_path, base):
    """Steps of SGD without clipping: g(c) = g_policy + c g_value for any coefficient c."""
    steps = {}
    for coef in (0.0, 1.0, 2.0):
        algorithm = HydraPPO(
            policy=lambda: seeded(JointHydra, base),
            value_coef=coef,
            optimizer=sgd,
            max_grad_norm=math.inf,
        )
        done = fit_with_base_rewards(tmp_path, algorithm, num_batches=1)
        assert "grad_norm" in done.callback_metrics
        start = trained(HydraOnly(seeded(JointHydra, base)))
        steps[coef] = [a - b for a, b in zip(trained(algorithm), start, strict=True)]
    for none, one, two in zip(*steps.values(), strict=True):
        assert torch.allclose(two - none, 2 * (one - none), atol=1e-6)
    assert any(
        not torch.allclose(none, one) for none, one in zip(steps[0.0], steps[1.0], strict=True)
    )


class HydraOnly:
    """Has the one attribute that `trained` reads."""

    def __init__(self, network):
        self.roles = {"policy": network}


def test_settings_of_a_separate_critic_are_refused_for_a_joint_adapter(base):
    for settings in ({"critic_lr": 1e-3}, {"critic_warmup_iterations": 2}):
        joint = HydraPPO(policy=lambda: seeded(JointHydra, base), **settings)
        with pytest.raises(UserError, match=r"Remove --model.critic_lr and --model.critic_w"):
            joint.configure_model()
    with pytest.raises(UserError, match=r"in its own base, .* Remove --model.reference"):
        HydraPPO(policy=lambda: seeded(Hydra, base), reference=lambda: Policy(base))


def test_shared_backbone_reward_needs_an_adapter_on_a_reward_model(tmp_path, base):
    with pytest.raises(UserError, match="or HydraPPO, found ReMax"):
        fit_with_base_rewards(tmp_path, ReMax(policy=lambda: Policy(base)))
    full = PPO(policy=lambda: Policy(base), critic=lambda: ScalarHead(base))
    with pytest.raises(RewardError, match=r"trains without an adapter. Set --model.critic.path"):
        fit_with_base_rewards(tmp_path, full)


def test_shared_backbone_reward_needs_a_trained_reward_head(tmp_path, base):
    Policy(base).save(tmp_path / "language")
    critic = PPO(
        policy=lambda: seeded(Policy, base),
        critic=lambda: seeded(ScalarHead, str(tmp_path / "language")),
    )
    with pytest.raises(RewardError, match=r"has no trained reward head. Set --model.critic"):
        fit_with_base_rewards(tmp_path, critic)


def test_the_base_scores_the_validation_too(tmp_path, base):
    torch.manual_seed(0)
    algorithm = HydraPPO(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    done = trainer(tmp_path)
    done.callbacks[:] = [
        Rollout(max_new_tokens=6),
        Reward(SharedBackboneReward()),
        *done.callbacks[2:],
    ]
    done.fit(algorithm, RandomPrompts(1))
    assert math.isfinite(float(done.callback_metrics["val/reward"]))

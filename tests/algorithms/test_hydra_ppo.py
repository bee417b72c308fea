"""Hydra: the joint loss of its SFT, updates of one trunk, equality with layouts of more models."""

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
    """The same adapters each time."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind(*args, lora=LoRA(r=4, lora_alpha=8), **settings)


def by_base(folder, algorithm, num_batches: int = 2) -> Trainer:
    """A run whose rewards are the frozen base's."""
    torch.manual_seed(0)
    done = trainer(folder, limit_val_batches=0)
    done.callbacks[1:2] = [Reward(SharedBackboneReward())]
    done.fit(algorithm, RandomPrompts(num_batches))
    return done


# Hydra-SFT ---------------------------------------------------------------------------------------


class Judged:
    """Stands for a two-headed model: logits [[2,0,0],[0,1,0]], scores 1 and 0.2 (H1)."""

    def score_pairs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([[2.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor([[0], [1]])).T
        return logprobs, torch.tensor([[1.0, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize(("reward_loss_coef", "expected"), [(0.1, 0.4326048), (1.0, 0.7665954)])
def test_h1_the_joint_loss(reward_loss_coef, expected):
    algorithm = HydraSFT(policy=lambda: None, reward_loss_coef=reward_loss_coef)
    algorithm.__dict__["policy"] = Judged()
    batch = PreferenceBatch(
        chosen_target_mask=torch.tensor([[False, True, True]]),
        margin=torch.zeros(1),
        token_weights=torch.tensor([0.5]),
    )
    (loss,) = algorithm.losses(batch)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_h1_the_score_is_pulled_as_bradley_and_terry_say():
    better = torch.tensor(1.0, requires_grad=True)
    bradley_terry(better, torch.tensor(0.2)).backward()
    assert float(better.grad) == pytest.approx(-0.3100255, abs=1e-6)


def test_h1_the_forks_mean_over_tokens():
    """From the first token that differs on; ours reads the last one alone, as rewards do."""
    chosen, rejected = torch.tensor([0.5, 1, 1.5]), torch.tensor([0.5, 0.2, 0.1])
    assert float(bradley_terry(chosen, rejected).mean()) == pytest.approx(0.4282218, abs=1e-6)


def test_language_loss_is_a_mean_over_tokens_and_reward_loss_over_pairs(tmp_path, base):
    """Whatever the micro-batches; checked against one pass over the whole batch."""
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


def test_only_adapters_and_value_head_move(tmp_path, base):
    algorithm = HydraPPO(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    by_base(tmp_path, algorithm)
    start, end = (
        dict(n.network.named_parameters()) for n in (seeded(Hydra, base), algorithm.policy)
    )
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert {ACTOR, CRITIC} == {word for name in moved for word in (ACTOR, CRITIC) if word in name}
    assert "score.modules_to_save.critic.weight" in moved
    assert all(".lora_" in name or "modules_to_save" in name for name in moved)


def test_reference_and_reward_stay_while_the_rest_learns(tmp_path, base):
    seen = []

    class Watched(HydraPPO):
        def prepare(self, batch):
            batch = super().prepare(batch)
            untouched = Policy(base).logprobs(batch)
            seen.append(float((batch.ref_logprobs - untouched).abs().max()))
            seen.append(float((batch.scores - ScalarHead(base).scores(batch)).abs().max()))
            return batch

    done = by_base(tmp_path, Watched(policy=lambda: seeded(Hydra, base), optimizer=sgd), 3)
    assert max(seen) < 1e-5
    assert len(seen) == 6
    assert float(done.callback_metrics["kl/per_response_k1"]) != 0.0


def test_the_first_rollout_has_no_kl_and_values_are_the_rewards_to_come(tmp_path, base):
    class Stopped(HydraPPO):
        def prepare(self, batch):
            self.kept = super().prepare(batch)
            return self.kept

    algorithm = Stopped(policy=lambda: seeded(Hydra, base), optimizer=sgd)
    done = by_base(tmp_path, algorithm, num_batches=1)
    batch = algorithm.kept
    assert float(done.callback_metrics["kl/per_response_k1"]) == 0.0
    assert torch.allclose(batch.values, ScalarHead(base).state_values(batch), atol=1e-5)


def test_hydra_computes_what_four_models_with_adapters_compute(tmp_path, base):
    """Same adapters on one trunk or on two: the same actor, critic, reward and reference."""

    def apart():
        with torch.random.fork_rng():  # Hydra draws the actor's adapter, then the critic's
            torch.manual_seed(2)
            return Policy(base, lora=LoRA(r=4, lora_alpha=8))

    settings = {"optimizer": sgd, "score_clip": 5.0, "whiten_advantages": False, "kl_coef": 0.02}
    four = PPO(
        policy=apart,
        critic=lambda: seeded(ScalarHead, base),
        reference=lambda: Policy(base),
        **settings,
    )
    one = HydraPPO(policy=lambda: seeded(Hydra, base), **settings)
    runs = [by_base(tmp_path, algorithm, num_batches=1) for algorithm in (four, one)]
    metrics = [{k: float(v) for k, v in run.callback_metrics.items()} for run in runs]
    for name in ("reward", "loss/policy_avg", "kl/per_response_k1"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6), name
    assert metrics[1]["loss/value_avg"] == pytest.approx(metrics[0]["loss/value_avg"], rel=1e-5)
    assert metrics[1]["grad_norm/policy"] == pytest.approx(metrics[0]["grad_norm/policy"], rel=1e-4)


def test_a_joint_adapters_gradient_is_the_sum_of_both(tmp_path, base):
    """Lengths of steps of plain SGD, unclipped: g(c) = g_policy + c g_value for any c."""
    steps = {}
    for coef in (0.0, 1.0, 2.0):
        algorithm = HydraPPO(
            policy=lambda: seeded(JointHydra, base),
            value_coef=coef,
            optimizer=sgd,
            max_grad_norm=math.inf,
        )
        done = by_base(tmp_path, algorithm, num_batches=1)
        assert "grad_norm" in done.callback_metrics
        start = trained(HydraOnly(seeded(JointHydra, base)))
        steps[coef] = [a - b for a, b in zip(trained(algorithm), start, strict=True)]
    for none, one, two in zip(*steps.values(), strict=True):
        assert torch.allclose(two - none, 2 * (one - none), atol=1e-6)
    assert any(
        not torch.allclose(none, one) for none, one in zip(steps[0.0], steps[1.0], strict=True)
    )


class HydraOnly:
    """Gives `trained` a network's weights."""

    def __init__(self, network):
        self.roles = {"policy": network}


def test_what_one_adapter_cannot_keep_apart_is_refused(base):
    for settings in ({"critic_lr": 1e-3}, {"critic_warmup_iterations": 2}):
        joint = HydraPPO(policy=lambda: seeded(JointHydra, base), **settings)
        with pytest.raises(ValueError, match="leave out critic_lr and critic_warmup_iterations"):
            joint.configure_model()
    with pytest.raises(ValueError, match="its own base with the adapters off: leave out reference"):
        HydraPPO(policy=lambda: seeded(Hydra, base), reference=lambda: Policy(base))


def test_shared_backbone_reward_is_refused_where_no_base_judges(tmp_path, base):
    with pytest.raises(ValueError, match="ReMax trains no reward model's base"):
        by_base(tmp_path, ReMax(policy=lambda: Policy(base)))
    whole = PPO(policy=lambda: Policy(base), critic=lambda: ScalarHead(base))
    with pytest.raises(RewardError, match="trains whole: give the critic"):
        by_base(tmp_path, whole)


def test_shared_backbone_reward_refuses_a_critic_without_a_trained_head(tmp_path, base):
    Policy(base).save(tmp_path / "language")
    critic = PPO(
        policy=lambda: seeded(Policy, base),
        critic=lambda: seeded(ScalarHead, str(tmp_path / "language")),
    )
    with pytest.raises(RewardError, match="has no trained reward head: give the critic"):
        by_base(tmp_path, critic)


def test_validation_scores_by_the_base_as_well(tmp_path, base):
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

"""Every algorithm learns a simple task in seconds.

Online: the score is the fraction of six response tokens that are token 5. The optimum is 1, and a
random policy starts at about 1/32. With scores shuffled over the rows, nothing can be learned.
Offline: train on 1,600 film reviews or pairs of them, and evaluate on 500 that are held out.
"""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_models import WORDS, RandomPrompts, adapted, tiny
from torch import Tensor
from torch.optim import AdamW

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.dpo import DPO, IPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.hydra_sft import HydraSFT
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.rloo import RLOO
from lit_align.algorithms.rto import RTO
from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.base import RewardFunction

MAX_TOKENS = 6  # tokens of a response
ALGORITHMS: dict[str, tuple[type[OnlineAlgorithm], dict]] = {
    "ReMax": (ReMax, {"num_samples": 4, "kl_coef": 0.0}),
    "GRPO": (GRPO, {"num_samples": 4, "kl_coef": 0.0}),
    "GRPO without scaling": (GRPO, {"num_samples": 4, "kl_coef": 0.0, "advantage_scale": "none"}),
    "GRPOVI": (GRPOVI, {"num_samples": 4, "kl_coef": 0.0}),
    "PPO": (PPO, {"kl_coef": 0.0, "update_epochs": 2}),
    "SPR": (SPR, {"num_samples": 4, "kl_coef": 0.0}),
    "HydraPPO": (
        HydraPPO,
        {
            "policy": partial(adapted, Hydra, 8, 0.2),
            "kl_coef": 0.0,
            "update_epochs": 2,
            "whiten_advantages": True,
        },
    ),
    "HydraPPO, joint": (
        HydraPPO,
        {
            "policy": partial(adapted, JointHydra, 8, 0.2),
            "kl_coef": 0.0,
            "update_epochs": 2,
            "whiten_advantages": True,
            "value_coef": 0.1,
        },
    ),
    "RTO": (RTO, {"kl_coef": 0.0, "update_epochs": 2, "dpo": partial(adapted, Policy, 2, 0.1)}),
    "RLOO": (RLOO, {"num_samples": 4, "kl_coef": 0.0}),
}


class TokenFraction(RewardFunction):
    """Reward: the fraction of the maximum length that token 5 fills."""

    def __init__(self, shuffled: bool = False):
        self.shuffled, self.seen = shuffled, []

    def __call__(self, batch: Experience) -> Tensor:
        fives = (batch.responses == 5) & batch.response_mask
        scores = fives.sum(-1) / MAX_TOKENS
        self.seen.append(float(scores.mean()))
        if self.shuffled:
            order = torch.randperm(
                len(scores), generator=torch.Generator().manual_seed(len(self.seen))
            )
            scores = scores[order]
        return scores


def closed_gap(name: str, seed: int, shuffled: bool) -> float:
    """Return the fraction of the gap between start and optimum that a run closes."""
    kind, settings = ALGORITHMS[name]
    torch.manual_seed(seed)
    algorithm = kind(
        optimizer=lambda p: AdamW(p, lr=1e-2),
        warmup_ratio=0.1,
        final_lr_ratio=0.1,
        **{"policy": tiny, **settings},
    )
    reward = TokenFraction(shuffled)
    run = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Rollout(max_new_tokens=MAX_TOKENS), Reward(reward)],
    )
    run.fit(algorithm, RandomPrompts(40, batch_size=64 // algorithm.num_samples))  # 64 rows each
    start, end = reward.seen[0], sum(reward.seen[-5:]) / 5
    return (end - start) / (1 - start)


SEEDS = [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
SECOND_TIER = {"GRPO without scaling", "HydraPPO, joint", "IPO"}  # near another algorithm
CONTROLS = {"ReMax", "PPO"}  # run with shuffled scores in the first tier


def in_tiers(names: Iterable[str], first: Collection[str]) -> list[Any]:
    """Return the names, all but `first` marked for the second tier."""
    return [pytest.param(n, marks=() if n in first else pytest.mark.long) for n in names]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", in_tiers(ALGORITHMS, ALGORITHMS.keys() - SECOND_TIER))
def test_a_run_closes_half_of_the_gap(name, seed):
    assert closed_gap(name, seed, shuffled=False) > 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", in_tiers(ALGORITHMS, CONTROLS))
def test_shuffled_scores_teach_nothing(name, seed):
    assert closed_gap(name, seed, shuffled=True) < 0.15


SMALL = {**WORDS, "initializer_range": 0.02}  # starts near a uniform policy
OFFLINE = {  # algorithm, data, metric on held-out rows, and its least change
    "SFT": (partial(SFT, policy=partial(Policy, config=SMALL)), InstructionData, "loss", -3.0),
    "RewardModel": (
        partial(RewardModel, reward_model=partial(ScalarHead, config=SMALL)),
        PreferenceData,
        "accuracy",
        0.2,
    ),
    "HydraSFT": (
        partial(HydraSFT, policy=partial(PolicyWithRewardHead, config=SMALL), reward_loss_coef=1.0),
        PreferenceData,
        "loss",
        -3.5,
    ),
    "DPO": (partial(DPO, policy=partial(Policy, config=SMALL)), PreferenceData, "accuracy", 0.2),
    "IPO": (partial(IPO, policy=partial(Policy, config=SMALL)), PreferenceData, "accuracy", 0.2),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", in_tiers(OFFLINE, OFFLINE.keys() - SECOND_TIER))
def test_held_out_metrics_improve(name, seed):
    """SFT starts at 5.2 nats and HydraSFT, with both losses, at 5.9.

    The others start at a guess and must get 7 of 10 pairs or more.
    """
    build, kind, metric, change = OFFLINE[name]
    torch.manual_seed(seed)
    algorithm = build(optimizer=lambda p: AdamW(p, lr=1e-2), warmup_ratio=0.1, final_lr_ratio=0.1)
    settings = {"eval_split": "test", "batch_size": 32, "max_rows": 1600, "seed": seed}
    data = kind("toy", tokenizer="toy", **settings)
    run = Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = run.validate(algorithm, data, verbose=False)[0][f"val/{metric}"]
    run.fit(algorithm, data)
    after = float(run.callback_metrics[f"val/{metric}"])
    assert (after - before) / change >= 1

"""The papers' speed claims, at equal sizes and at equal memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import lit_align_side
from bench.case import Case
from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import Hydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.base import RewardFunction
from lit_align.rewards.reward_model import ModelReward
from lit_align.rewards.shared_backbone import SharedBackboneReward

CLAIMS = [("remax", "ppo"), ("hydra_ppo", "lora_ppo")]


def prepare(folder: Path) -> None:
    """Write a reward model and a two-headed model of the policy's size, unless they exist."""
    if (folder / "two_headed").exists():
        return
    model = str(folder / "model")
    ScalarHead(model).save(folder / "reward")
    PolicyWithRewardHead(model).save(folder / "two_headed")
    for name in ("reward", "two_headed"):
        for file in (folder / "model").glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())


def algorithm(name: str, case: Case, folder: Path) -> tuple[Algorithm, RewardFunction]:
    """Build the algorithm and its reward, a model of the policy's size."""
    model, reward_model = str(folder / "model"), str(folder / "reward")
    settings: dict[str, Any] = {
        "microbatch_tokens": case.shape.rows_per_microbatch * case.shape.max_tokens
    }
    lora = LoRA(r=16, lora_alpha=16)
    if name == "remax":
        return ReMax(policy=partial(Policy, model), **settings), ModelReward(reward_model)
    if name == "ppo":
        critic = partial(ScalarHead, reward_model)
        return PPO(policy=partial(Policy, model), critic=critic, **settings), ModelReward(
            reward_model
        )
    if name == "lora_ppo":
        adapted = {
            "policy": partial(Policy, model, lora=lora),
            "reference": partial(Policy, model),
        }
        critic = partial(ScalarHead, reward_model, lora=lora)
        return PPO(**adapted, critic=critic, **settings), ModelReward(reward_model)
    hydra = partial(Hydra, str(folder / "two_headed"), lora=lora)
    return HydraPPO(policy=hydra, **settings), SharedBackboneReward()


def run(name: str, case: Case, folder: Path, steps: int, after_step: Callable[[], None]) -> None:
    """Take `steps` optimizer steps and call `after_step` after each."""
    built, reward_model = algorithm(name, case, folder)
    callbacks = [Rollout(max_new_tokens=case.shape.response), Reward(reward_model)]
    lit_align_side.fit(case, folder, steps, after_step, built, callbacks)


def run_case(
    own: Case, name: str, case: Case, folder: Path, steps: int, after_step: Callable[[], None]
) -> None:
    """Run `own` in place of the case of the other side, which has more of the same rows."""
    run(name, own, folder, steps, after_step)


def largest_fitting_factor(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits. 1 must fit, and larger numbers must need more."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""The papers' speed claims, at equal sizes and at equal memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import ours
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
from lit_align.models.policy_with_reward_head import TwoHeaded
from lit_align.models.scalar_head import Scalar
from lit_align.rewards.base import RewardFunction
from lit_align.rewards.reward_model import LearnedReward
from lit_align.rewards.shared_backbone import BaseReward

CLAIMS = [("remax", "ppo"), ("hydra_ppo", "lora_ppo")]


def prepare(folder: Path) -> None:
    """A reward model and a two-headed model beside the policy, of the same size, if lacking."""
    if (folder / "two_headed").exists():
        return
    model = str(folder / "model")
    Scalar(model).save(folder / "reward")
    TwoHeaded(model).save(folder / "two_headed")
    for name in ("reward", "two_headed"):
        for file in (folder / "model").glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())


def algorithm(name: str, case: Case, folder: Path) -> tuple[Algorithm, RewardFunction]:
    """The algorithm, and what judges its answers: a reward model of the policy's size."""
    model, judge = str(folder / "model"), str(folder / "reward")
    settings: dict[str, Any] = {"microbatch_tokens": case.shape.part * case.shape.longest}
    small = LoRA(rank=16, alpha=16)
    if name == "remax":
        return ReMax(policy=partial(Policy, model), **settings), LearnedReward(judge)
    if name == "ppo":
        critic = partial(Scalar, judge)
        return PPO(policy=partial(Policy, model), critic=critic, **settings), LearnedReward(judge)
    if name == "lora_ppo":
        adapted = {
            "policy": partial(Policy, model, lora=small),
            "reference": partial(Policy, model),
        }
        critic = partial(Scalar, judge, lora=small)
        return PPO(**adapted, critic=critic, **settings), LearnedReward(judge)
    hydra = partial(Hydra, str(folder / "two_headed"), lora=small)
    return HydraPPO(policy=hydra, **settings), BaseReward()


def run(name: str, case: Case, folder: Path, steps: int, stepped: Callable[[], None]) -> None:
    """So many optimizer steps; `stepped` is called after each."""
    what, judge = algorithm(name, case, folder)
    callbacks = [Rollout(max_new_tokens=case.shape.answer), Reward(judge)]
    ours.fit(case, folder, steps, stepped, what, callbacks)


def run_as(
    own: Case, name: str, case: Case, folder: Path, steps: int, stepped: Callable[[], None]
) -> None:
    """`run` of a case of its own, beside another side that makes more of the same rows."""
    run(name, own, folder, steps, stepped)


def most_times(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, given that 1 does and that larger ones need more."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

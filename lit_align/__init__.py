"""lit_align aligns language models with memory-efficient RLHF on Lightning.

The names below are imported when they are first used, so that `import lit_align` stays cheap:

    from lit_align import ReMax, Policy, PromptData, Rollout, Reward
"""

import importlib
from typing import TYPE_CHECKING, Any

from lit_align.version import __version__ as __version__

if TYPE_CHECKING:
    from lit_align.algorithms.dpo import DPO as DPO
    from lit_align.algorithms.grpo import GRPO as GRPO
    from lit_align.algorithms.grpovi import GRPOVI as GRPOVI
    from lit_align.algorithms.hydra_ppo import HydraPPO as HydraPPO
    from lit_align.algorithms.hydra_sft import HydraSFT as HydraSFT
    from lit_align.algorithms.ppo import PPO as PPO
    from lit_align.algorithms.remax import ReMax as ReMax
    from lit_align.algorithms.reward_model import RewardModel as RewardModel
    from lit_align.algorithms.rloo import RLOO as RLOO
    from lit_align.algorithms.rto import RTO as RTO
    from lit_align.algorithms.sft import SFT as SFT
    from lit_align.algorithms.spr import SPR as SPR
    from lit_align.callbacks.checkpoint import Checkpoints as Checkpoints
    from lit_align.callbacks.reward import Reward as Reward
    from lit_align.callbacks.rollout import Rollout as Rollout
    from lit_align.data.instructions import InstructionData as InstructionData
    from lit_align.data.offline_responses import OfflineResponseData as OfflineResponseData
    from lit_align.data.preferences import PreferenceData as PreferenceData
    from lit_align.data.prompts import PromptData as PromptData
    from lit_align.data.rated_pairs import RatedPairs as RatedPairs
    from lit_align.models.adapters.lora import LoRA as LoRA
    from lit_align.models.adapters.sparse_lora import SparseLowRankAdapter as SparseLowRankAdapter
    from lit_align.models.hydra import Hydra as Hydra
    from lit_align.models.hydra import JointHydra as JointHydra
    from lit_align.models.parallel.fsdp2 import FSDP2 as FSDP2
    from lit_align.models.policy import Policy as Policy
    from lit_align.models.policy_with_reward_head import (
        PolicyWithRewardHead as PolicyWithRewardHead,
    )
    from lit_align.models.scalar_head import ScalarHead as ScalarHead
    from lit_align.models.sltrain import SLTrain as SLTrain
    from lit_align.optim.galore import GaLore as GaLore
    from lit_align.optim.galore import GaLoreAdamW as GaLoreAdamW
    from lit_align.rewards.base import RewardFunction as RewardFunction
    from lit_align.rewards.function import FunctionReward as FunctionReward
    from lit_align.rewards.reward_model import ModelReward as ModelReward
    from lit_align.rewards.shared_backbone import SharedBackboneReward as SharedBackboneReward

_MODULES = {  # the module of each public name; a test compares it with the imports above
    "DPO": "algorithms.dpo",
    "GRPO": "algorithms.grpo",
    "GRPOVI": "algorithms.grpovi",
    "HydraPPO": "algorithms.hydra_ppo",
    "HydraSFT": "algorithms.hydra_sft",
    "PPO": "algorithms.ppo",
    "ReMax": "algorithms.remax",
    "RewardModel": "algorithms.reward_model",
    "RLOO": "algorithms.rloo",
    "RTO": "algorithms.rto",
    "SFT": "algorithms.sft",
    "SPR": "algorithms.spr",
    "Checkpoints": "callbacks.checkpoint",
    "Reward": "callbacks.reward",
    "Rollout": "callbacks.rollout",
    "InstructionData": "data.instructions",
    "OfflineResponseData": "data.offline_responses",
    "PreferenceData": "data.preferences",
    "PromptData": "data.prompts",
    "RatedPairs": "data.rated_pairs",
    "LoRA": "models.adapters.lora",
    "SparseLowRankAdapter": "models.adapters.sparse_lora",
    "Hydra": "models.hydra",
    "JointHydra": "models.hydra",
    "FSDP2": "models.parallel.fsdp2",
    "Policy": "models.policy",
    "PolicyWithRewardHead": "models.policy_with_reward_head",
    "ScalarHead": "models.scalar_head",
    "SLTrain": "models.sltrain",
    "GaLore": "optim.galore",
    "GaLoreAdamW": "optim.galore",
    "RewardFunction": "rewards.base",
    "FunctionReward": "rewards.function",
    "ModelReward": "rewards.reward_model",
    "SharedBackboneReward": "rewards.shared_backbone",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Args:
        name: Such as ReMax.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_align' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_align.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, for completion in a notebook."""
    return [*globals(), *_MODULES]

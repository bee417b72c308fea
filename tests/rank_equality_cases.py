"""Runs of every algorithm that any number of ranks must repeat, with their tolerances."""

from functools import partial

import torch
from tiny_models import (
    TINY,
    WORDS,
    RandomOfflineResponses,
    RandomPairs,
    RandomPrompts,
    RandomTexts,
    adapted,
    scalar,
    tiny,
    trained,
    trainer,
)
from torch.optim import SGD, AdamW

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
from lit_align.callbacks.reward import Reward
from lit_align.data.preferences import PreferenceData
from lit_align.models.adapters.lora import LoRA
from lit_align.models.adapters.sparse_lora import SparseLowRankAdapter
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.sltrain import SLTrain
from lit_align.optim.galore import GaLore
from lit_align.rewards.shared_backbone import SharedBackboneReward


def adam(params):
    # eps is far above rounding noise, by which AdamW would otherwise take a full step
    return AdamW(params, lr=1e-2, eps=1e-4)


def sgd(params):
    return SGD(params, lr=0.1)


class SharedPrompts(RandomPrompts):
    """Prompts for runs whose reward model shares the frozen base."""


def remax(policy, optimizer):
    return ReMax(policy=policy, num_samples=2, microbatch_tokens=40, optimizer=optimizer)


def grpo(policy, optimizer):
    sizes = {"num_samples": 2, "update_epochs": 2, "microbatch_tokens": 40}
    return GRPO(policy=policy, optimizer=optimizer, loss_aggregation="token_mean", **sizes)


def grpovi(policy, optimizer):
    sizes = {"num_samples": 2, "microbatch_tokens": 40}
    return GRPOVI(
        policy=policy, optimizer=optimizer, running_bounds=True, advantage_scale="none", **sizes
    )


def rloo(policy, optimizer):
    sizes = {"num_samples": 2, "update_epochs": 2, "microbatch_tokens": 40}
    return RLOO(policy=policy, optimizer=optimizer, **sizes)


def spr(policy, optimizer, num_offline_samples):
    sizes = {
        "num_offline_samples": num_offline_samples,
        "update_epochs": 2,
        "microbatch_tokens": 40,
    }
    return SPR(policy=policy, optimizer=optimizer, offline_half_life=2.0, **sizes)


def ppo(policy, optimizer):
    more = {"update_epochs": 2, "microbatch_tokens": 40, "loss_aggregation": "sequence_mean"}
    more |= {"critic_lr": 2e-2, "kl_target": 0.1, "kl_horizon": 20, "normalize_scores": True}
    return PPO(policy=policy, optimizer=optimizer, missing_eos_penalty=0.5, **more)


def dynamic_ppo(optimizer, dtype=None):
    roles = {"policy": partial(adapted, Policy, dtype=dtype)}
    roles["critic"] = partial(adapted, ScalarHead, dtype=dtype)
    more = {"microbatch_tokens": 40, "score_clip": 2.0, "critic_warmup_iterations": 1}
    return PPO(**roles, optimizer=optimizer, **more)


def four_model_ppo(optimizer):
    roles = {"policy": partial(adapted, Policy), "critic": partial(adapted, ScalarHead)}
    return PPO(**roles, reference=tiny, optimizer=optimizer, update_epochs=2, microbatch_tokens=40)


def rto(policy, optimizer, dtype=None):
    models = {"critic": partial(scalar, dtype=dtype)}
    models["dpo"] = partial(adapted, Policy, spread=0.1, dtype=dtype)
    more = {"microbatch_tokens": 40, "dpo_clip": 0.05}
    return RTO(policy=policy, optimizer=optimizer, **models, **more)


def adapter_on(base):
    """Return a policy with the same adapter each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(base, lora=LoRA(r=2, lora_alpha=4))


def rto_adapter(base, dpo):
    models = {"policy": partial(adapter_on, base), "critic": scalar}
    return RTO(**models, dpo_adapter=dpo, optimizer=adam, microbatch_tokens=40)


def hydra_ppo(kind, optimizer, dtype):
    policy = partial(adapted, kind, dtype=dtype)
    return HydraPPO(policy=policy, optimizer=optimizer, microbatch_tokens=40, update_epochs=2)


def hydra_sft(optimizer, dtype, **settings):
    policy = partial(PolicyWithRewardHead, config=dict(TINY), dtype=dtype, **settings)
    return HydraSFT(policy=policy, optimizer=optimizer, microbatch_tokens=30)


def sft(optimizer, **settings):
    return SFT(policy=partial(tiny, **settings), microbatch_tokens=9, optimizer=optimizer)


def galore(params):
    return GaLore(params, lr=1e-2, rank=3, update_gap=2)


def reward_model(model, optimizer):
    return RewardModel(reward_model=model, microbatch_tokens=30, optimizer=optimizer)


def dpo(policy, optimizer, kind=DPO, **settings):
    return kind(policy=policy, microbatch_tokens=30, optimizer=optimizer, **settings)


def toy_pairs(num_batches, batch_size):
    return PreferenceData("toy", tokenizer="toy", max_rows=12, batch_size=batch_size)


double = partial(tiny, dtype="float64")
low_rank = partial(tiny, lora=LoRA(r=2, lora_alpha=4))
sparse = partial(tiny, lora=SparseLowRankAdapter(r=2, density=0.1))
factors = {"dtype": "float64", "sltrain": SLTrain(rank=4, alpha=2, density=0.1)}

CASES = {
    "ReMax, AdamW in float32": (partial(remax, tiny, adam), RandomPrompts, 1e-5),
    "ReMax, SGD in float64": (partial(remax, double, sgd), RandomPrompts, 1e-9),
    "ReMax, LoRA": (partial(remax, low_rank, adam), RandomPrompts, 1e-5),
    "ReMax, low-rank and sparse adapter": (partial(remax, sparse, adam), RandomPrompts, 1e-5),
    "GRPO, AdamW in float32": (partial(grpo, tiny, adam), RandomPrompts, 1e-5),
    "GRPO, SGD in float64": (partial(grpo, double, sgd), RandomPrompts, 1e-9),
    "GRPO, LoRA": (partial(grpo, low_rank, adam), RandomPrompts, 1e-5),
    "GRPOVI, AdamW in float32": (partial(grpovi, tiny, adam), RandomPrompts, 1e-5),
    "GRPOVI, SGD in float64": (partial(grpovi, double, sgd), RandomPrompts, 1e-9),
    "GRPOVI, LoRA": (partial(grpovi, low_rank, adam), RandomPrompts, 1e-5),
    "RLOO, AdamW in float32": (partial(rloo, tiny, adam), RandomPrompts, 1e-5),
    "RLOO, SGD in float64": (partial(rloo, double, sgd), RandomPrompts, 1e-9),
    "RLOO, LoRA": (partial(rloo, low_rank, adam), RandomPrompts, 1e-5),
    "SPR, AdamW in float32": (partial(spr, tiny, adam, 0), RandomPrompts, 1e-5),
    "SPR, SGD in float64": (partial(spr, double, sgd, 3), RandomOfflineResponses, 1e-9),
    "SPR, LoRA": (partial(spr, low_rank, adam, 0), RandomPrompts, 1e-5),
    "SPR, offline responses with a half-life": (
        partial(spr, tiny, adam, 3), RandomOfflineResponses, 1e-5),
    "PPO, critic on the policy's backbone": (partial(ppo, tiny, adam), RandomPrompts, 1e-5),
    "PPO, SGD in float64": (partial(ppo, double, sgd), RandomPrompts, 1e-9),
    "PPO, four models of which two are adapted": (
        partial(four_model_ppo, adam), RandomPrompts, 1e-5),
    "PPO on two adapted bases": (partial(dynamic_ppo, adam), SharedPrompts, 1e-5),
    "PPO on two adapted bases, SGD in float64": (
        partial(dynamic_ppo, sgd, "float64"), SharedPrompts, 1e-9),
    "HydraPPO, AdamW in float32": (partial(hydra_ppo, Hydra, adam, None), SharedPrompts, 1e-5),
    "HydraPPO, SGD in float64": (partial(hydra_ppo, Hydra, sgd, "float64"), RandomPrompts, 1e-9),
    "HydraPPO, one joint adapter": (
        partial(hydra_ppo, JointHydra, adam, None), SharedPrompts, 1e-5),
    "HydraPPO, one joint adapter, SGD in float64": (
        partial(hydra_ppo, JointHydra, sgd, "float64"), SharedPrompts, 1e-9),
    "HydraSFT, AdamW in float32": (partial(hydra_sft, adam, None), RandomPairs, 1e-5),
    "HydraSFT, AdamW in float64": (partial(hydra_sft, adam, "float64"), RandomPairs, 1e-9),
    "HydraSFT, SGD in float64": (partial(hydra_sft, sgd, "float64"), RandomPairs, 1e-9),
    "RTO, a DPO model of its own": (partial(rto, tiny, adam), RandomPrompts, 1e-5),
    "RTO, SGD in float64": (partial(rto, double, sgd, "float64"), RandomPrompts, 1e-9),
    "RTO, LoRA": (partial(rto, low_rank, adam), RandomPrompts, 1e-5),
    "SFT, AdamW in float32": (partial(sft, adam), RandomTexts, 1e-5),
    "SFT, AdamW in float64": (partial(sft, adam, dtype="float64"), RandomTexts, 1e-9),
    "SFT, SGD in float64": (partial(sft, sgd, dtype="float64"), RandomTexts, 1e-9),
    "SFT, LoRA": (partial(sft, adam, lora=LoRA(r=2, lora_alpha=4)), RandomTexts, 1e-5),
    "SFT, SLTrain in float64": (partial(sft, adam, **factors), RandomTexts, 1e-9),
    "SFT, GaLore in float64": (partial(sft, galore, dtype="float64"), RandomTexts, 1e-9),
    "RewardModel, AdamW in float32": (partial(reward_model, scalar, adam), RandomPairs, 1e-5),
    "RewardModel, SGD in float64": (
        partial(reward_model, partial(scalar, dtype="float64"), sgd), RandomPairs, 1e-9),
    "RewardModel, LoRA": (
        partial(reward_model, partial(adapted, ScalarHead), adam), RandomPairs, 1e-5),
    "DPO, AdamW in float32": (partial(dpo, tiny, adam), RandomPairs, 1e-5),
    "DPO, SGD in float64": (partial(dpo, double, sgd), RandomPairs, 1e-9),
    "DPO, LoRA": (partial(dpo, low_rank, adam), RandomPairs, 1e-5),
    "DPO, precomputed": (
        partial(dpo, partial(tiny, config=WORDS), adam, precompute=True), toy_pairs, 1e-5),
    "DPO, precomputed, SGD in float64": (
        partial(dpo, partial(tiny, config=WORDS, dtype="float64"), sgd, precompute=True),
        toy_pairs, 1e-9),
    "IPO, AdamW in float32": (partial(dpo, tiny, adam, kind=IPO), RandomPairs, 1e-5),
    "IPO, SGD in float64": (partial(dpo, double, sgd, kind=IPO), RandomPairs, 1e-9),
}  # fmt: skip


def fit_three_batches(folder, algorithm, data, **settings):
    """Return weights and metrics after three batches, with one seed for all ranks."""
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, **settings)
    if not isinstance(algorithm, OnlineAlgorithm):
        run.callbacks.clear()
    elif isinstance(data, SharedPrompts):
        run.callbacks[1] = Reward(SharedBackboneReward())
    run.fit(algorithm, data)
    return trained(algorithm), {k: float(v) for k, v in run.callback_metrics.items()}

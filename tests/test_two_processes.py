"""Two sharded ranks compute what one process computes."""

import socket
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from harness import (
    TINY,
    WORDS,
    RandomAnswers,
    RandomPairs,
    RandomPrompts,
    RandomTexts,
    adapted,
    distance,
    scalar,
    tiny,
    trained,
    trainer,
    weights,
)
from ranks import Ranks
from torch import distributed
from torch.optim import SGD, AdamW

from lit_align.algorithms.dpo import DPO, IPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.hydra_sft import HydraSFT
from lit_align.algorithms.online import OnlineAlgorithm
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.rloo import RLOO
from lit_align.algorithms.rto import RTO
from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.callbacks.reward import Reward
from lit_align.data.preferences import PreferenceData
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.lora import LoRA
from lit_align.models.policy import Policy
from lit_align.models.scalar import Scalar
from lit_align.models.sltrain import SLTrain
from lit_align.models.sparse_adapter import SparseLowRankAdapter
from lit_align.models.two_headed import TwoHeaded
from lit_align.optim.galore import GaLore
from lit_align.rewards.base_reward import BaseReward


def started(number: int) -> Iterator[Ranks]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(number, port)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    yield from started(2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    yield from started(4)


def adam(params):
    # eps is far above rounding noise: in its direction AdamW would take a whole step
    return AdamW(params, lr=1e-2, eps=1e-4)


def sgd(params):
    return SGD(params, lr=0.1)


STRATEGIES = ("fsdp2", "ddp")


def fit(folder, algorithm, data, **settings):
    """Weights and metrics after three batches; the seed is the same everywhere."""
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, **settings)
    if not isinstance(algorithm, OnlineAlgorithm):
        run.callbacks.clear()
    elif isinstance(data, Based):
        run.callbacks[1] = Reward(BaseReward())
    run.fit(algorithm, data)
    return trained(algorithm), {k: float(v) for k, v in run.callback_metrics.items()}


def fit_sharded(folder, build, data, strategy, ranks=2):
    return fit(folder, build(), data(3, 4 // ranks), devices=ranks, strategy=strategy)


def remax(policy, optimizer):
    return ReMax(policy=policy, num_samples=2, microbatch_tokens=40, optimizer=optimizer)


def grpo():
    sizes = {"num_samples": 2, "epochs": 2, "microbatch_tokens": 40}
    return GRPO(policy=tiny, optimizer=adam, per_response=False, **sizes)


def grpovi():
    sizes = {"num_samples": 2, "microbatch_tokens": 40}
    return GRPOVI(policy=tiny, optimizer=adam, running_bounds=True, scale=False, **sizes)


def rloo():
    return RLOO(policy=tiny, num_samples=2, epochs=2, microbatch_tokens=40, optimizer=adam)


def spr(policy, optimizer, num_stored):
    sizes = {"num_stored": num_stored, "epochs": 2, "microbatch_tokens": 40}
    return SPR(policy=policy, optimizer=optimizer, stored_decay=2.0, **sizes)


def ppo():
    more = {"epochs": 2, "microbatch_tokens": 40, "per_response": True}
    more |= {"critic_lr": 2e-2, "kl_target": 0.1, "kl_horizon": 20, "normalise_scores": True}
    return PPO(policy=tiny, optimizer=adam, missing_eos_penalty=0.5, **more)


class Based(RandomPrompts):
    """Prompts for runs whose frozen base is the reward model."""


def dynamic_ppo():
    roles = {"policy": partial(adapted, Policy), "critic": partial(adapted, Scalar)}
    return PPO(**roles, optimizer=adam, microbatch_tokens=40, score_clip=2.0, critic_warmup=1)


def rto():
    models = {"policy": tiny, "critic": scalar, "dpo": partial(adapted, Policy, spread=0.1)}
    return RTO(**models, optimizer=adam, microbatch_tokens=40, dpo_clip=0.05)


def hydra_ppo(kind, optimizer, dtype):
    policy = partial(adapted, kind, dtype=dtype)
    return HydraPPO(policy=policy, optimizer=optimizer, microbatch_tokens=40, epochs=2)


def hydra_sft():
    policy = partial(TwoHeaded, config=dict(TINY), dtype="float64")
    return HydraSFT(policy=policy, optimizer=adam, microbatch_tokens=30)


def sft(**settings):
    # float64: AdamW makes a whole step of an embedding row's gradient of rounding noise
    policy = partial(tiny, dtype="float64", **settings)
    return SFT(policy=policy, microbatch_tokens=9, optimizer=adam)


def galore():
    policy = partial(tiny, dtype="float64")
    optimizer = partial(GaLore, lr=1e-2, rank=3, update_gap=2)
    return SFT(policy=policy, microbatch_tokens=9, optimizer=optimizer)


def reward_model():
    return RewardModel(reward_model=scalar, microbatch_tokens=30, optimizer=adam)


def dpo(policy, optimizer, kind=DPO, **settings):
    return kind(policy=policy, microbatch_tokens=30, optimizer=optimizer, **settings)


def toy_pairs(num_batches, batch_size):
    return PreferenceData("toy", tokenizer="toy", max_rows=12, batch_size=batch_size)


CASES = {
    "ReMax, AdamW in float32": (partial(remax, tiny, adam), RandomPrompts, 1e-5),
    "ReMax, SGD in float64": (
        partial(remax, partial(tiny, dtype="float64"), sgd), RandomPrompts, 1e-9),
    "ReMax, LoRA": (
        partial(remax, partial(tiny, lora=LoRA(rank=2, alpha=4)), adam), RandomPrompts, 1e-5),
    "GRPO, two epochs": (grpo, RandomPrompts, 1e-5),
    "GRPOVI, running bounds": (grpovi, RandomPrompts, 1e-5),
    "RLOO, two epochs": (rloo, RandomPrompts, 1e-5),
    "SPR, AdamW in float32": (partial(spr, tiny, adam, 0), RandomPrompts, 1e-5),
    "SPR, stored answers that decay": (partial(spr, tiny, adam, 3), RandomAnswers, 1e-5),
    "SPR, SGD in float64": (
        partial(spr, partial(tiny, dtype="float64"), sgd, 3), RandomAnswers, 1e-9),
    "PPO, critic on the policy's trunk": (ppo, RandomPrompts, 1e-5),
    "PPO on two adapted bases": (dynamic_ppo, Based, 1e-5),
    "HydraPPO, AdamW in float32": (partial(hydra_ppo, Hydra, adam, None), Based, 1e-5),
    "HydraPPO, SGD in float64": (partial(hydra_ppo, Hydra, sgd, "float64"), RandomPrompts, 1e-9),
    "HydraPPO, one joint adapter": (
        partial(hydra_ppo, JointHydra, adam, None), Based, 1e-5),
    "HydraSFT, AdamW in float64": (hydra_sft, RandomPairs, 1e-9),
    "RTO, a DPO model of its own": (rto, RandomPrompts, 1e-5),
    "SFT, AdamW in float64": (sft, RandomTexts, 1e-9),
    "SFT, SLTrain in float64": (
        partial(sft, sltrain=SLTrain(rank=4, alpha=2, density=0.1)), RandomTexts, 1e-9),
    "ReMax, low-rank and sparse adapter": (
        partial(remax, partial(tiny, lora=SparseLowRankAdapter(rank=2, density=0.1)), adam),
        RandomPrompts, 1e-5),
    "SFT, GaLore in float64": (galore, RandomTexts, 1e-9),
    "RewardModel, AdamW in float32": (reward_model, RandomPairs, 1e-5),
    "DPO, AdamW in float32": (partial(dpo, tiny, adam), RandomPairs, 1e-5),
    "DPO, SGD in float64": (partial(dpo, partial(tiny, dtype="float64"), sgd), RandomPairs, 1e-9),
    "DPO, LoRA": (
        partial(dpo, partial(tiny, lora=LoRA(rank=2, alpha=4)), adam), RandomPairs, 1e-5),
    "DPO, precomputed": (
        partial(dpo, partial(tiny, config=WORDS), adam, precompute=True), toy_pairs, 1e-5),
    "DPO, precomputed, SGD in float64": (
        partial(dpo, partial(tiny, config=WORDS, dtype="float64"), sgd, precompute=True),
        toy_pairs, 1e-9),
    "IPO, SGD in float64": (
        partial(dpo, partial(tiny, dtype="float64"), sgd, kind=IPO), RandomPairs, 1e-9),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks, tmp_path, case, strategy):
    compare(two_ranks, 2, tmp_path, case, strategy)


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_equal_one(four_ranks, tmp_path, case, strategy):
    compare(four_ranks, 4, tmp_path, case, strategy)


def compare(ranks, number, tmp_path, case, strategy):
    """Weights and metrics of some ranks with those of one process on the same rows."""
    build, data, tolerance = CASES[case]
    start = build()
    start.configure_model()
    one, metrics = fit(tmp_path, build(), data(3, 4))
    assert max(float((a - b).norm()) for a, b in zip(one, trained(start), strict=True)) > 1e-3
    for sharded, measured in ranks(fit_sharded, tmp_path, build, data, strategy, number):
        assert distance(sharded, one) < tolerance
        assert measured.keys() == metrics.keys()
        for name in metrics:
            assert measured[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def fit_and_save(folder, build, data):
    """A sharded run; every rank takes part in saving, the first one writes."""
    algorithm = build()
    fit(folder, algorithm, data(3, 2), devices=2, strategy="fsdp2")
    (network,) = algorithm.roles.values()
    network.save(folder / "hf", main=algorithm.global_rank == 0)
    return weights(network)


@pytest.mark.parametrize("case", ["ReMax, AdamW in float32", "RewardModel, AdamW in float32"])
def test_sharded_weights_are_saved_whole(two_ranks, tmp_path, case):
    build, data, _ = CASES[case]
    trained, _ = two_ranks(fit_and_save, tmp_path, build, data)
    start = build()
    start.configure_model()
    (network,) = start.roles.values()
    loaded = type(network)(str(tmp_path / "hf"))
    for mine, saved in zip(trained, loaded.parameters(), strict=True):
        assert torch.equal(mine, saved)


def test_sharded_factors_are_saved_as_dense_weights(two_ranks, tmp_path):
    build, data, _ = CASES["SFT, SLTrain in float64"]
    two_ranks(fit_and_save, tmp_path, build, data)
    algorithm = build()
    fit(tmp_path, algorithm, data(3, 4))
    algorithm.policy.save(tmp_path / "one")
    sharded, one = (Policy(str(tmp_path / name), dtype="float64") for name in ("hf", "one"))
    assert distance(weights(sharded), weights(one)) < 1e-9


def support_by_rank(folder):
    """The first layer's positions on ranks of different seeds."""
    torch.manual_seed(distributed.get_rank())
    policy = Policy(config=dict(TINY), sltrain=SLTrain(rank=4, alpha=2, density=0.1))
    return policy.network.model.layers[0].mlp.up_proj.sparse_index.tolist()


def test_ranks_of_different_seeds_have_one_support(two_ranks, tmp_path):
    first, second = two_ranks(support_by_rank, tmp_path)
    assert first == second

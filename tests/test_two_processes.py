"""Two sharded ranks compute what one process computes."""

import socket
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from harness import (
    RandomPairs,
    RandomPrompts,
    RandomTexts,
    distance,
    scalar,
    tiny,
    trained,
    trainer,
    weights,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import Ranks
from torch.optim import SGD, AdamW

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.algorithms.online import OnlineAlgorithm
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.rloo import RLOO
from lit_align.algorithms.sft import SFT
from lit_align.models.lora import LoRA


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    yield ranks
    ranks.close()


def adam(params):
    return AdamW(params, lr=1e-2)


def sgd(params):
    return SGD(params, lr=0.1)


STRATEGIES = {
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    "ddp": lambda: "ddp_find_unused_parameters_true",  # as the CLI sets it for several losses
}


def fit(folder, algorithm, data, **settings):
    """Weights and metrics after three batches; the seed is the same everywhere."""
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, **settings)
    if not isinstance(algorithm, OnlineAlgorithm):
        run.callbacks.clear()
    run.fit(algorithm, data)
    return trained(algorithm), {k: float(v) for k, v in run.callback_metrics.items()}


def fit_sharded(folder, build, data, strategy):
    strategy = STRATEGIES[strategy]()
    return fit(folder, build(), data(3, 2), devices=2, strategy=strategy)


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


def ppo():
    more = {"epochs": 2, "microbatch_tokens": 40, "per_response": True}
    more |= {"critic_lr": 2e-2, "kl_target": 0.1, "kl_horizon": 20, "normalise_scores": True}
    return PPO(policy=tiny, optimizer=adam, missing_eos_penalty=0.5, **more)


def sft():
    # float64: AdamW makes a whole step of an embedding row's gradient of rounding noise
    policy = partial(tiny, dtype="float64")
    return SFT(policy=policy, microbatch_tokens=9, optimizer=adam)


def reward_model():
    return RewardModel(reward_model=scalar, microbatch_tokens=30, optimizer=adam)


CASES = {
    "ReMax, AdamW in float32": (partial(remax, tiny, adam), RandomPrompts, 1e-5),
    "ReMax, SGD in float64": (
        partial(remax, partial(tiny, dtype="float64"), sgd), RandomPrompts, 1e-9),
    "ReMax, LoRA": (
        partial(remax, partial(tiny, lora=LoRA(rank=2, alpha=4)), adam), RandomPrompts, 1e-5),
    "GRPO, two epochs": (grpo, RandomPrompts, 1e-5),
    "GRPOVI, running bounds": (grpovi, RandomPrompts, 1e-5),
    "RLOO, two epochs": (rloo, RandomPrompts, 1e-5),
    "PPO, critic on the policy's trunk": (ppo, RandomPrompts, 1e-5),
    "SFT, AdamW in float64": (sft, RandomTexts, 1e-9),
    "RewardModel, AdamW in float32": (reward_model, RandomPairs, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks, tmp_path, case, strategy):
    build, data, tolerance = CASES[case]
    start = build()
    start.configure_model()
    one, metrics = fit(tmp_path, build(), data(3, 4))
    assert max(float((a - b).norm()) for a, b in zip(one, trained(start), strict=True)) > 1e-3
    for sharded, measured in two_ranks(fit_sharded, tmp_path, build, data, strategy):
        assert distance(sharded, one) < tolerance
        assert measured.keys() == metrics.keys()
        for name in metrics:
            assert measured[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def fit_and_save(folder, build, data):
    """A sharded run; every rank takes part in saving, the first one writes."""
    algorithm = build()
    fit(folder, algorithm, data(3, 2), devices=2, strategy=STRATEGIES["fsdp2"]())
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

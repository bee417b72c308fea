"""Two sharded ranks compute what one process computes."""

import socket
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from harness import RandomPrompts, distance, tiny, trainer, weights
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import Ranks
from torch.optim import SGD, AdamW

from lit_align.algorithms.remax import ReMax
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
    "ddp": lambda: "ddp",
}


def fit(folder, batch_size, optimizer, policy, **settings):
    """Weights and metrics after three rollouts; the seed is the same everywhere."""
    torch.manual_seed(0)
    algorithm = ReMax(policy=policy, num_samples=2, microbatch_tokens=40, optimizer=optimizer)
    run = trainer(folder, **settings)
    run.fit(algorithm, RandomPrompts(3, batch_size))
    return weights(algorithm.policy), {k: float(v) for k, v in run.callback_metrics.items()}


def fit_sharded(folder, optimizer, policy, strategy):
    return fit(folder, 2, optimizer, policy, devices=2, strategy=STRATEGIES[strategy]())


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize(
    ("optimizer", "policy", "tolerance"),
    [
        pytest.param(adam, tiny, 1e-5, id="AdamW in float32"),
        pytest.param(sgd, partial(tiny, dtype="float64"), 1e-9, id="SGD in float64"),
        pytest.param(adam, partial(tiny, lora=LoRA(rank=2, alpha=4)), 1e-5, id="LoRA"),
    ],
)
def test_remax_on_two_ranks_equals_one(two_ranks, tmp_path, optimizer, policy, tolerance, strategy):
    one, metrics = fit(tmp_path, 4, optimizer, policy)
    assert max(float((a - b).norm()) for a, b in zip(one, weights(policy()), strict=True)) > 1e-3
    for sharded, measured in two_ranks(fit_sharded, tmp_path, optimizer, policy, strategy):
        assert distance(sharded, one) < tolerance
        for name in ("reward", "reward_std", "kl", "objective/kl", "entropy", "loss", "grad_norm"):
            assert measured[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name

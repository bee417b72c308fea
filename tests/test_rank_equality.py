"""Two ranks, and four, compute what one process computes."""

import socket
from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch
from rank_equality_cases import CASES, adam, adapter_on, fit_three_batches, remax, rto_adapter, sgd
from spawn_ranks import Ranks
from tiny_models import TINY, RandomPrompts, distance, tiny, trained, weights
from torch import distributed

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.ppo import PPO
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.policy import Policy
from lit_align.models.sltrain import SLTrain


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


STRATEGIES = ("fsdp2", "ddp")
FIRST = {  # beside the cases that are held to 1e-9, of which each algorithm has one
    *("ReMax, AdamW in float32", "RewardModel, AdamW in float32", "ReMax, LoRA", "DPO, LoRA"),
    *("ReMax, low-rank and sparse adapter", "SPR, stored answers that decay", "DPO, precomputed"),
    *("PPO, critic on the policy's trunk", "PPO, four models of which two are adapted"),
    *("HydraPPO, one joint adapter", "RTO, a DPO model of its own"),
}
SHARDED, COPIED = STRATEGIES
EXACT = {case for case, (*_, tolerance) in CASES.items() if tolerance <= 1e-9}
IN_TIERS = [
    pytest.param(case, strategy, marks=() if case in first else pytest.mark.long)
    for strategy, first in ((SHARDED, EXACT | FIRST), (COPIED, EXACT))
    for case in CASES
]


def fit_sharded(folder, build, data, strategy, ranks=2):
    return fit_three_batches(folder, build(), data(3, 4 // ranks), devices=ranks, strategy=strategy)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of a case; asked for once per strategy."""

    @cache
    def weights_and_metrics(case):
        build, data, _ = CASES[case]
        return fit_three_batches(tmp_path_factory.mktemp("one"), build(), data(3, 4))

    return weights_and_metrics


@pytest.mark.parametrize(("case", "strategy"), IN_TIERS)
def test_two_ranks_equal_one(two_ranks, alone, tmp_path, case, strategy):
    ranks = two_ranks(fit_sharded, tmp_path, *CASES[case][:2], strategy, 2)
    compare(ranks, CASES[case], *alone(case))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_with_a_dpo_adapter_on_the_base_equal_one(two_ranks, tmp_path, strategy):
    """RTO's adapter is read over weights that each rank takes from their file."""
    base, dpo = (str(tmp_path / name) for name in ("base", "dpo"))
    tiny().save(tmp_path / "base")
    learnt = adapter_on(base)
    for number, weight in enumerate(w for w in learnt.parameters() if w.requires_grad):
        weight.data = 0.2 * (torch.arange(weight.numel()) + number).sin().view_as(weight)
    learnt.save(tmp_path / "dpo")
    case = partial(rto_adapter, base, dpo), RandomPrompts, 1e-5
    ranks = two_ranks(fit_sharded, tmp_path, *case[:2], strategy, 2)
    compare(ranks, case, *fit_three_batches(tmp_path, case[0](), RandomPrompts(3, 4)))


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_two_ranks_that_compile_their_blocks_equal_one(
    two_ranks, tmp_path, strategy, activation_checkpointing
):
    policy = partial(tiny, compile=True, activation_checkpointing=activation_checkpointing)
    case = partial(remax, policy, adam), RandomPrompts, 1e-5
    ranks = two_ranks(fit_sharded, tmp_path, *case[:2], strategy, 2)
    compare(ranks, case, *fit_three_batches(tmp_path, remax(tiny, adam), RandomPrompts(3, 4)))


def fit_recomputed(folder, build):
    """A fit under a strategy that lets blocks keep their inputs alone."""
    return fit_sharded(folder, build, RandomPrompts, FSDP2(activation_checkpointing=True))


@pytest.mark.long
def test_two_ranks_compile_what_their_strategy_computes_again(two_ranks, tmp_path):
    case = partial(remax, partial(tiny, compile=True), adam), RandomPrompts, 1e-5
    ranks = two_ranks(fit_recomputed, tmp_path, case[0])
    compare(ranks, case, *fit_three_batches(tmp_path, remax(tiny, adam), RandomPrompts(3, 4)))


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_equal_one(four_ranks, alone, tmp_path, case, strategy):
    ranks = four_ranks(fit_sharded, tmp_path, *CASES[case][:2], strategy, 4)
    compare(ranks, CASES[case], *alone(case))


def compare(ranks, case, one, metrics):
    """Weights and metrics of some ranks with those of one process on the same rows."""
    build, _, tolerance = case
    start = build()
    start.configure_model()
    assert max(float((a - b).norm()) for a, b in zip(one, trained(start), strict=True)) > 1e-3
    for sharded, measured in ranks:
        assert distance(sharded, one) < tolerance
        assert measured.keys() == metrics.keys()
        for name in metrics:
            assert measured[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def in_minibatches(kind, rows):
    sizes = {"update_epochs": 2, "minibatch_size": rows, "microbatch_tokens": 20}
    policy = partial(tiny, dtype="float64")
    algorithm = kind(policy=policy, optimizer=sgd, **sizes)
    algorithm.num_samples = 2
    return algorithm


def compare_minibatches(ranks, number, tmp_path, kind):
    """Eight rows of a rollout in two optimizer steps, on all ranks together."""
    one, _ = fit_three_batches(tmp_path, in_minibatches(kind, 4), RandomPrompts(3, 4))
    build = partial(in_minibatches, kind, 4 // number)
    for sharded, _ in ranks(fit_sharded, tmp_path, build, RandomPrompts, "fsdp2", number):
        assert distance(sharded, one) < 1e-9
    whole, _ = fit_three_batches(tmp_path, in_minibatches(kind, None), RandomPrompts(3, 4))
    assert distance(whole, one) > 1e-3


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_minibatches_of_two_ranks_are_those_of_one(two_ranks, tmp_path, kind):
    compare_minibatches(two_ranks, 2, tmp_path, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_minibatches_of_four_ranks_are_those_of_one(four_ranks, tmp_path, kind):
    compare_minibatches(four_ranks, 4, tmp_path, kind)


def fit_and_save(folder, build, data):
    """A sharded run; every rank takes part in saving, the first one writes."""
    algorithm = build()
    fit_three_batches(folder, algorithm, data(3, 2), devices=2, strategy="fsdp2")
    (network,) = algorithm.roles.values()
    network.save(folder / "hf", is_main_process=algorithm.global_rank == 0)
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
    fit_three_batches(tmp_path, algorithm, data(3, 4))
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

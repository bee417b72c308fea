"""Two and four ranks compute the same as one process."""

from functools import cache, partial

import pytest
import torch
from rank_equality_cases import CASES, adam, adapter_on, fit_three_batches, remax, rto_adapter, sgd
from tiny_models import TINY, RandomPrompts, distance, tiny, trained, weights
from torch import distributed

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.ppo import PPO
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.policy import Policy
from lit_align.models.sltrain import SLTrain

STRATEGIES = ("fsdp2", "ddp")
EXACT = {case for case, (*_, tolerance) in CASES.items() if tolerance <= 1e-9}
FIRST_TIER = {  # each algorithm has one case that is held to 1e-9
    "fsdp2": EXACT
    | {
        "ReMax, AdamW in float32",
        "ReMax, LoRA",
        "ReMax, low-rank and sparse adapter",
        "PPO, four models of which two are adapted",
    },
    "ddp": {
        "ReMax, SGD in float64",
        "PPO, SGD in float64",
        "HydraPPO, SGD in float64",
        "HydraSFT, SGD in float64",
        "SFT, GaLore in float64",
    },
}
IN_TIERS = [
    pytest.param(case, strategy, marks=() if case in FIRST_TIER[strategy] else pytest.mark.long)
    for strategy in STRATEGIES
    for case in CASES
]


def fit_sharded(folder, build, data, strategy, ranks=2):
    return fit_three_batches(folder, build(), data(3, 4 // ranks), devices=ranks, strategy=strategy)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights and metrics of a case in one process, computed once."""

    @cache
    def weights_and_metrics(case):
        build, data, _ = CASES[case]
        return fit_three_batches(tmp_path_factory.mktemp("one"), build(), data(3, 4))

    return weights_and_metrics


@pytest.mark.parametrize(("case", "strategy"), IN_TIERS)
def test_two_ranks_equal_one(two_ranks, alone, tmp_path, case, strategy):
    ranks = two_ranks(fit_sharded, tmp_path, *CASES[case][:2], strategy, 2)
    assert_equal_to_one(ranks, CASES[case], *alone(case))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_with_a_dpo_adapter_on_the_base_equal_one(two_ranks, tmp_path, strategy):
    """RTO loads its adapter onto weights of which each rank reads its shard."""
    base, dpo = (str(tmp_path / name) for name in ("base", "dpo"))
    tiny().save(tmp_path / "base")
    trained_adapter = adapter_on(base)
    for number, weight in enumerate(w for w in trained_adapter.parameters() if w.requires_grad):
        weight.data = 0.2 * (torch.arange(weight.numel()) + number).sin().view_as(weight)
    trained_adapter.save(tmp_path / "dpo")
    case = partial(rto_adapter, base, dpo), RandomPrompts, 1e-5
    ranks = two_ranks(fit_sharded, tmp_path, *case[:2], strategy, 2)
    assert_equal_to_one(ranks, case, *fit_three_batches(tmp_path, case[0](), RandomPrompts(3, 4)))


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_two_ranks_with_compiled_blocks_equal_one(
    two_ranks, tmp_path, strategy, activation_checkpointing
):
    policy = partial(tiny, compile=True, activation_checkpointing=activation_checkpointing)
    case = partial(remax, policy, adam), RandomPrompts, 1e-5
    ranks = two_ranks(fit_sharded, tmp_path, *case[:2], strategy, 2)
    assert_equal_to_one(
        ranks, case, *fit_three_batches(tmp_path, remax(tiny, adam), RandomPrompts(3, 4))
    )


def fit_recomputed(folder, build):
    """Fit with activation checkpointing set by the strategy."""
    return fit_sharded(folder, build, RandomPrompts, FSDP2(activation_checkpointing=True))


@pytest.mark.long
def test_two_ranks_compile_blocks_that_the_strategy_checkpoints(two_ranks, tmp_path):
    case = partial(remax, partial(tiny, compile=True), adam), RandomPrompts, 1e-5
    ranks = two_ranks(fit_recomputed, tmp_path, case[0])
    assert_equal_to_one(
        ranks, case, *fit_three_batches(tmp_path, remax(tiny, adam), RandomPrompts(3, 4))
    )


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_equal_one(four_ranks, alone, tmp_path, case, strategy):
    ranks = four_ranks(fit_sharded, tmp_path, *CASES[case][:2], strategy, 4)
    assert_equal_to_one(ranks, CASES[case], *alone(case))


def assert_equal_to_one(ranks, case, one, metrics):
    """Compare weights and metrics of all ranks with those of one process on the same rows."""
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


def assert_minibatches_equal_one(ranks, number, tmp_path, kind):
    """Compare eight rows in two optimizer steps, on all ranks together, with one process."""
    one, _ = fit_three_batches(tmp_path, in_minibatches(kind, 4), RandomPrompts(3, 4))
    build = partial(in_minibatches, kind, 4 // number)
    for sharded, _ in ranks(fit_sharded, tmp_path, build, RandomPrompts, "fsdp2", number):
        assert distance(sharded, one) < 1e-9
    single_step, _ = fit_three_batches(tmp_path, in_minibatches(kind, None), RandomPrompts(3, 4))
    assert distance(single_step, one) > 1e-3


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_minibatches_of_two_ranks_are_those_of_one(two_ranks, tmp_path, kind):
    assert_minibatches_equal_one(two_ranks, 2, tmp_path, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_minibatches_of_four_ranks_are_those_of_one(four_ranks, tmp_path, kind):
    assert_minibatches_equal_one(four_ranks, 4, tmp_path, kind)


def fit_and_save(folder, build, data):
    """Run sharded and save: every rank gathers, the first one writes."""
    algorithm = build()
    fit_three_batches(folder, algorithm, data(3, 2), devices=2, strategy="fsdp2")
    (network,) = algorithm.roles.values()
    network.save(folder / "hf", is_main_process=algorithm.global_rank == 0)
    return weights(network)


@pytest.mark.parametrize("case", ["ReMax, AdamW in float32", "RewardModel, AdamW in float32"])
def test_sharded_weights_are_saved_unsharded(two_ranks, tmp_path, case):
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
    """Return the first layer's sparse positions on ranks of different seeds."""
    torch.manual_seed(distributed.get_rank())
    policy = Policy(config=dict(TINY), sltrain=SLTrain(rank=4, alpha=2, density=0.1))
    return policy.network.model.layers[0].mlp.up_proj.sparse_index.tolist()


def test_ranks_of_different_seeds_have_one_support(two_ranks, tmp_path):
    first, second = two_ranks(support_by_rank, tmp_path)
    assert first == second

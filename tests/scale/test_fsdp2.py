"""One word shards a run; what it may be told changes memory, never the result."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from rank_equality_cases import CASES, fit_three_batches
from tiny_models import RandomPairs, RandomPrompts, distance, tiny, trainer, weights
from torch import distributed

from lit_align.algorithms.dpo import DPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.remax import ReMax
from lit_align.cli.align import ExportCLI
from lit_align.cli.overlays import resolve_configs
from lit_align.models.generation import prefill
from lit_align.models.generation.prefill import PromptTensors, prefill_chunk
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.sharding import all_reduce_max, fsdp_modules, unsharded_size

CASE = "ReMax, AdamW in float32"
STRATEGIES = {
    "the word": lambda: "fsdp2",
    "the word for offloading": lambda: "fsdp2_cpu_offload",
    "Lightning's own class": lambda: ModelParallelStrategy(2, 1),
    "a copy per rank": lambda: FSDP2(num_replicas=2),  # of two
    "a copy per node": lambda: FSDP2(num_replicas=0),
    "shards in host memory": lambda: FSDP2(cpu_offload=True),
    "inputs of blocks alone": lambda: FSDP2(activation_checkpointing=True),
    "gradients that are shared out at once": lambda: FSDP2(sync_every_microbatch=True),
}


def fit_under(folder, name, ranks=2):
    """Weights after three batches, and the largest part of a tensor that a rank holds."""
    build, data, _ = CASES[CASE]
    algorithm, strategy = build(), STRATEGIES[name]()
    trained, _ = fit_three_batches(
        folder, algorithm, data(3, 4 // ranks), devices=ranks, strategy=strategy
    )
    held = []
    for network in (algorithm.policy, algorithm.reference):
        for part in fsdp_modules(network):
            part.reshard()
        held += [weight.to_local().numel() / weight.numel() for weight in network.parameters()]
    return trained, max(held)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes."""
    build, data, _ = CASES[CASE]
    return fit_three_batches(tmp_path_factory.mktemp("one"), build(), data(3, 4))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_layout_of_two_ranks_equals_one_process(two_ranks, one, tmp_path, name):
    for trained, held in two_ranks(fit_under, tmp_path, name):
        assert distance(trained, one) < 1e-5
        assert held == (1.0 if name == "a copy per rank" else 0.5)


@pytest.mark.long
def test_two_copies_of_two_shares_equal_one_process(four_ranks, one, tmp_path):
    for trained, held in four_ranks(fit_under, tmp_path, "a copy per rank", 4):
        assert distance(trained, one) < 1e-5
        assert held == 0.5


def copies(folder):
    """Shape of the mesh, and the ranks that hold the other shares of this rank's copy."""
    algorithm = ReMax(policy=tiny)
    run = trainer(folder, devices=2, num_nodes=1, strategy=FSDP2(num_replicas=2))
    run.fit(algorithm, RandomPrompts(1, 1))
    mesh = algorithm.device_mesh
    return mesh.mesh_dim_names, mesh["shard"].mesh.tolist(), mesh["replicate"].mesh.tolist()


def test_a_copy_is_split_over_neighbours(two_ranks, tmp_path):
    for rank, (names, shard, replicate) in enumerate(two_ranks(copies, tmp_path)):
        assert names == ("replicate", "shard")
        assert shard == [rank]
        assert replicate == [0, 1]


def uneven(folder):
    run = trainer(folder, devices=2, strategy=FSDP2(num_replicas=3))
    with pytest.raises(ValueError, match="num_replicas 3 does not divide 2 ranks"):
        run.fit(ReMax(policy=tiny), RandomPrompts(1, 1))


def test_copies_must_be_equal(two_ranks, tmp_path):
    two_ranks(uneven, tmp_path)


def test_the_words_are_lightnings_own_flags():
    chosen = [
        Trainer(accelerator="cpu", devices=2, strategy=word, logger=False).strategy
        for word in ("fsdp2", "fsdp2_cpu_offload")
    ]
    assert [(type(strategy), strategy.cpu_offload) for strategy in chosen] == [
        (FSDP2, False),
        (FSDP2, True),
    ]


@pytest.mark.parametrize("more", [(), ("--trainer.strategy.num_replicas", "2")])
def test_its_class_needs_no_settings(more):
    words = ["fit", "--config", "sft", "--config", "toy", "--trainer.devices", "2"]
    words += ["--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2", *more]
    strategy = ExportCLI(resolve_configs(words)).trainer.strategy
    assert (type(strategy), strategy.num_replicas) == (FSDP2, 2 if more else 1)


def test_fsdp1_is_refused_in_a_sentence(tmp_path):
    run = trainer(tmp_path)
    algorithm = ReMax(policy=tiny)
    algorithm.trainer = run
    run._accelerator_connector.strategy = FSDPStrategy()  # Lightning itself asks for a GPU
    with pytest.raises(ValueError, match=r"Set --trainer.strategy fsdp2"):
        algorithm.setup("fit")


def parallel_in_tensors(folder):
    run = trainer(folder, devices=2, strategy=ModelParallelStrategy())  # what its `auto` means
    with pytest.raises(ValueError, match=r"Tensor parallelism over 2 ranks.*strategy fsdp2"):
        run.fit(ReMax(policy=tiny), RandomPrompts(1, 1))


def test_tensor_parallelism_is_refused_in_a_sentence(two_ranks, tmp_path):
    two_ranks(parallel_in_tensors, tmp_path)


@pytest.mark.parametrize(("kind", "wanted"), [(HydraPPO, True), (ReMax, None)])
def test_ddp_looks_for_idle_weights_only_where_losses_are_several(tmp_path, kind, wanted):
    run = trainer(tmp_path)
    algorithm = kind(policy=tiny)
    algorithm.trainer = run
    run._accelerator_connector.strategy = DDPStrategy()
    algorithm.setup("fit")
    assert run.strategy._ddp_kwargs.get("find_unused_parameters") is wanted


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize(
    ("precision", "compute", "reduce"),
    [
        ("32-true", None, None),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", None, torch.float32),
    ],
)
def test_gradients_are_never_summed_over_ranks_in_halves(precision, compute, reduce):
    run = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", precision=precision, logger=False)
    assert run.strategy.sharding[:2] == (compute, reduce)


PRECISIONS = {  # distance of where the weights went, relative to how far they went
    "32-true": 1e-5,
    "bf16-mixed": 0.01,
    "bf16-true": 0.05,  # steps are rounded to 8 bits
}
RUNS = {
    "DPO": (lambda: DPO(policy=tiny, optimizer=sgd, microbatch_tokens=30), RandomPairs),
    "ReMax": (lambda: ReMax(policy=tiny, optimizer=sgd, microbatch_tokens=40), RandomPrompts),
}


def fit_precisely(folder, name, precision, devices):
    """Weights and metrics; the trained weights of a sharded run stay in their own type."""
    build, data = RUNS[name]
    algorithm = build()
    more = {"devices": devices, "strategy": "fsdp2"} if devices > 1 else {}
    return fit_three_batches(folder, algorithm, data(3, 4 // devices), precision=precision, **more)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_means_the_same_sharded(two_ranks, tmp_path, precision):
    start = weights(tiny())
    one, metrics = fit_precisely(tmp_path, "DPO", precision, 1)
    kinds = {weight.dtype for weight in one}
    assert kinds == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    way = torch.cat([(b - a).flatten() for a, b in zip(start, one, strict=True)])
    for trained, measured in two_ranks(fit_precisely, tmp_path, "DPO", precision, 2):
        assert {weight.dtype for weight in trained} == kinds
        off = torch.cat([(b - a).flatten() for a, b in zip(one, trained, strict=True)])
        assert off.norm() < PRECISIONS[precision] * way.norm()
        assert measured["loss"] == pytest.approx(metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_callbacks_sample_and_score_in_the_precision_of_the_update(two_ranks, tmp_path, precision):
    _, metrics = fit_precisely(tmp_path, "ReMax", precision, 1)
    for trained, measured in two_ranks(fit_precisely, tmp_path, "ReMax", precision, 2):
        assert all(bool(weight.isfinite().all()) for weight in trained)
        assert measured["entropy"] == pytest.approx(metrics["entropy"], rel=0.01)
        assert measured["sampling/sampling_logp_difference/mean"] < 1e-5


def answers(folder, gather):
    """What a sharded policy answers, and whether whole weights were gathered for it."""
    algorithm = GRPO(policy=tiny, num_samples=2, microbatch_tokens=40)
    seen = []
    prepare = algorithm.prepare
    algorithm.prepare = lambda batch: seen.append(batch.responses) or prepare(batch)
    strategy = "auto" if gather == "one process" else FSDP2(gather_for_generation=gather)
    devices = 1 if gather == "one process" else 2
    run = trainer(folder, devices=devices, strategy=strategy, limit_val_batches=0)
    torch.manual_seed(0)
    run.fit(algorithm, RandomPrompts(1, 4 // devices))
    return seen[0], algorithm.policy.shard_state.gather_for_generation


@pytest.mark.parametrize("gather", [True, False, None])
def test_answers_are_the_same_from_shards(two_ranks, tmp_path, gather):
    whole, _ = answers(tmp_path, "one process")
    for rank, (mine, gathers) in enumerate(two_ranks(answers, tmp_path, gather)):
        width = mine.shape[1]
        assert torch.equal(mine, whole.view(2, 2, 2, -1)[:, rank].flatten(0, 1)[:, :width])
        assert gathers is (gather is not False)


def in_parts(folder):
    """The same where a rank must read its two prompts in two passes, and the other could in one."""
    with pytest.MonkeyPatch.context() as patch:
        at_once = 10**5 if distributed.get_rank() else 5
        patch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", at_once)
        return answers(folder, False)[0]


def test_ranks_that_share_weights_read_prompts_in_equally_many_passes(two_ranks, tmp_path):
    whole, _ = answers(tmp_path, "one process")
    for rank, mine in enumerate(two_ranks(in_parts, tmp_path)):
        width = mine.shape[1]
        assert torch.equal(mine, whole.view(2, 2, 2, -1)[:, rank].flatten(0, 1)[:, :width])


def passes(folder, rows, at_once):
    """How many a rank makes that has so many prompts of five tokens."""
    number = rows[distributed.get_rank()]
    mask = torch.ones(number, 5, dtype=torch.long)
    prompts, parts = PromptTensors(mask, mask, mask.cumsum(-1) - 1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "PREFILL_CHUNK_TOKENS", at_once)
        patch.setattr(
            prefill,
            "prefill_chunk",
            lambda network, part: parts.append(part) or prefill_chunk(network, part),
        )
        prefill.prefill(tiny().network, prompts, all_reduce_max)
    assert sum(len(part.tokens) for part in parts) == number
    return len(parts)


@pytest.mark.parametrize(
    ("rows", "at_once", "wanted"), [((3, 5), 10, 3), ((1, 5), 5, 1), ((5, 3), 5, 3)]
)
def test_ranks_agree_on_the_passes_over_prompts(two_ranks, tmp_path, rows, at_once, wanted):
    """As many as the one with most needs, unless another has not so many prompts."""
    assert two_ranks(passes, tmp_path, rows, at_once) == [wanted, wanted]


def crowded(folder):
    """What is said where memory is short, and the answer of each rank to whether weights fit."""
    with pytest.MonkeyPatch.context() as patch:
        rank = distributed.get_rank()
        free = [10**9, 10**5][rank]
        patch.setattr("lit_align.models.parallel.sharding.free_memory", lambda device: free)
        said = pytest.warns(UserWarning, match="responses are generated from shards")
        with nullcontext() if rank else said:  # the first rank speaks for all
            return answers(folder, None)[1]


def test_one_rank_without_room_decides_for_all(two_ranks, tmp_path):
    assert two_ranks(crowded, tmp_path) == [False, False]


@pytest.mark.parametrize(("compute", "size"), [(None, 4), (torch.bfloat16, 2)])
def test_the_estimate_counts_blocks_as_they_are_gathered(compute, size):
    policy = tiny()
    blocks = sum(w.numel() for block in policy.blocks for w in block.parameters())
    rest = sum(w.numel() for w in policy.parameters()) - blocks
    assert unsharded_size(policy, policy.blocks, compute) == size * blocks + 4 * rest

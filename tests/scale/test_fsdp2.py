"""FSDP2: its settings change memory, never the result."""

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
    "fsdp2": lambda: "fsdp2",
    "fsdp2_cpu_offload": lambda: "fsdp2_cpu_offload",
    "ModelParallelStrategy": lambda: ModelParallelStrategy(2, 1),
    "one replica per rank": lambda: FSDP2(num_replicas=2),
    "one replica per node": lambda: FSDP2(num_replicas=0),
    "CPU offload": lambda: FSDP2(cpu_offload=True),
    "activation checkpointing": lambda: FSDP2(activation_checkpointing=True),
    "gradients synchronized per micro-batch": lambda: FSDP2(sync_every_microbatch=True),
}


def fit_under(folder, name, ranks=2):
    """Return weights after three batches, and the largest fraction of a tensor on this rank."""
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
    """Weights that one process computes."""
    build, data, _ = CASES[CASE]
    return fit_three_batches(tmp_path_factory.mktemp("one"), build(), data(3, 4))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_under_every_setting_equal_one_process(two_ranks, one, tmp_path, name):
    for trained, held in two_ranks(fit_under, tmp_path, name):
        assert distance(trained, one) < 1e-5
        assert held == (1.0 if name == "one replica per rank" else 0.5)


@pytest.mark.long
def test_two_replicas_of_two_shards_equal_one_process(four_ranks, one, tmp_path):
    for trained, held in four_ranks(fit_under, tmp_path, "one replica per rank", 4):
        assert distance(trained, one) < 1e-5
        assert held == 0.5


def replica_mesh(folder):
    """Return the mesh's dimensions and the ranks in this rank's groups along each."""
    algorithm = ReMax(policy=tiny)
    run = trainer(folder, devices=2, num_nodes=1, strategy=FSDP2(num_replicas=2))
    run.fit(algorithm, RandomPrompts(1, 1))
    mesh = algorithm.device_mesh
    return mesh.mesh_dim_names, mesh["shard"].mesh.tolist(), mesh["replicate"].mesh.tolist()


def test_a_replica_is_sharded_over_neighboring_ranks(two_ranks, tmp_path):
    for rank, (names, shard, replicate) in enumerate(two_ranks(replica_mesh, tmp_path)):
        assert names == ("replicate", "shard")
        assert shard == [rank]
        assert replicate == [0, 1]


def fit_three_replicas(folder):
    run = trainer(folder, devices=2, strategy=FSDP2(num_replicas=3))
    with pytest.raises(ValueError, match="num_replicas 3 does not divide 2 ranks"):
        run.fit(ReMax(policy=tiny), RandomPrompts(1, 1))


def test_replicas_must_have_equal_sizes(two_ranks, tmp_path):
    two_ranks(fit_three_replicas, tmp_path)


def test_short_names_select_the_strategy():
    chosen = [
        Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
        for name in ("fsdp2", "fsdp2_cpu_offload")
    ]
    assert [(type(strategy), strategy.cpu_offload) for strategy in chosen] == [
        (FSDP2, False),
        (FSDP2, True),
    ]


@pytest.mark.parametrize("more", [(), ("--trainer.strategy.num_replicas", "2")])
def test_the_class_path_needs_no_settings(more):
    words = ["fit", "--config", "sft", "--config", "toy", "--trainer.devices", "2"]
    words += ["--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2", *more]
    strategy = ExportCLI(resolve_configs(words)).trainer.strategy
    assert (type(strategy), strategy.num_replicas) == (FSDP2, 2 if more else 1)


def test_fsdp1_is_refused(tmp_path):
    run = trainer(tmp_path)
    algorithm = ReMax(policy=tiny)
    algorithm.trainer = run
    run._accelerator_connector.strategy = FSDPStrategy()  # Lightning itself requires a GPU for it
    with pytest.raises(ValueError, match=r"Set --trainer.strategy fsdp2"):
        algorithm.setup("fit")


def fit_with_tensor_parallelism(folder):
    run = trainer(folder, devices=2, strategy=ModelParallelStrategy())  # its sizes are `auto`
    with pytest.raises(ValueError, match=r"Tensor parallelism over 2 ranks.*strategy fsdp2"):
        run.fit(ReMax(policy=tiny), RandomPrompts(1, 1))


def test_tensor_parallelism_is_refused(two_ranks, tmp_path):
    two_ranks(fit_with_tensor_parallelism, tmp_path)


@pytest.mark.parametrize(("kind", "wanted"), [(HydraPPO, True), (ReMax, None)])
def test_ddp_finds_unused_weights_only_for_several_losses(tmp_path, kind, wanted):
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
def test_gradients_are_never_reduced_in_half_precision(precision, compute, reduce):
    run = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", precision=precision, logger=False)
    assert run.strategy.sharding[:2] == (compute, reduce)


PRECISIONS = {  # error of the weight change, relative to the change
    "32-true": 1e-5,
    "bf16-mixed": 0.01,
    "bf16-true": 0.05,  # steps are rounded to 8 bits
}
RUNS = {
    "DPO": (lambda: DPO(policy=tiny, optimizer=sgd, microbatch_tokens=30), RandomPairs),
    "ReMax": (lambda: ReMax(policy=tiny, optimizer=sgd, microbatch_tokens=40), RandomPrompts),
}


def fit_in_precision(folder, name, precision, devices):
    """Return weights and metrics. Trained weights keep their dtype in a sharded run."""
    build, data = RUNS[name]
    algorithm = build()
    more = {"devices": devices, "strategy": "fsdp2"} if devices > 1 else {}
    return fit_three_batches(folder, algorithm, data(3, 4 // devices), precision=precision, **more)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sharded_runs_equal_one_process_in_every_precision(two_ranks, tmp_path, precision):
    start = weights(tiny())
    one, metrics = fit_in_precision(tmp_path, "DPO", precision, 1)
    kinds = {weight.dtype for weight in one}
    assert kinds == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    change = torch.cat([(b - a).flatten() for a, b in zip(start, one, strict=True)])
    for trained, measured in two_ranks(fit_in_precision, tmp_path, "DPO", precision, 2):
        assert {weight.dtype for weight in trained} == kinds
        error = torch.cat([(b - a).flatten() for a, b in zip(one, trained, strict=True)])
        assert error.norm() < PRECISIONS[precision] * change.norm()
        assert measured["loss"] == pytest.approx(metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_callbacks_sample_and_score_in_the_precision_of_the_update(two_ranks, tmp_path, precision):
    _, metrics = fit_in_precision(tmp_path, "ReMax", precision, 1)
    for trained, measured in two_ranks(fit_in_precision, tmp_path, "ReMax", precision, 2):
        assert all(bool(weight.isfinite().all()) for weight in trained)
        assert measured["entropy"] == pytest.approx(metrics["entropy"], rel=0.01)
        assert measured["sampling/sampling_logp_difference/mean"] < 1e-5


def sampled_responses(folder, gather):
    """Return the responses of a sharded policy, and True if weights were gathered for them."""
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
def test_responses_are_equal_with_and_without_gathering(two_ranks, tmp_path, gather):
    unsharded, _ = sampled_responses(tmp_path, "one process")
    for rank, (mine, gathers) in enumerate(two_ranks(sampled_responses, tmp_path, gather)):
        width = mine.shape[1]
        assert torch.equal(mine, unsharded.view(2, 2, 2, -1)[:, rank].flatten(0, 1)[:, :width])
        assert gathers is (gather is not False)


def responses_in_chunks(folder):
    """Return responses where one rank prefills its two prompts in two chunks, the other in one."""
    with pytest.MonkeyPatch.context() as patch:
        at_once = 10**5 if distributed.get_rank() else 5
        patch.setattr("lit_align.models.generation.prefill.PREFILL_CHUNK_TOKENS", at_once)
        return sampled_responses(folder, False)[0]


def test_ranks_with_shards_prefill_in_equally_many_chunks(two_ranks, tmp_path):
    unsharded, _ = sampled_responses(tmp_path, "one process")
    for rank, mine in enumerate(two_ranks(responses_in_chunks, tmp_path)):
        width = mine.shape[1]
        assert torch.equal(mine, unsharded.view(2, 2, 2, -1)[:, rank].flatten(0, 1)[:, :width])


def num_prefill_chunks(folder, rows, max_tokens):
    """Return the number of prefill chunks of a rank that has `rows` prompts of five tokens."""
    number = rows[distributed.get_rank()]
    mask = torch.ones(number, 5, dtype=torch.long)
    prompts, parts = PromptTensors(mask, mask, mask.cumsum(-1) - 1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "PREFILL_CHUNK_TOKENS", max_tokens)
        patch.setattr(
            prefill,
            "prefill_chunk",
            lambda network, part: parts.append(part) or prefill_chunk(network, part),
        )
        prefill.prefill(tiny().network, prompts, all_reduce_max)
    assert sum(len(part.tokens) for part in parts) == number
    return len(parts)


@pytest.mark.parametrize(
    ("rows", "max_tokens", "expected"), [((3, 5), 10, 3), ((1, 5), 5, 1), ((5, 3), 5, 3)]
)
def test_ranks_agree_on_the_number_of_prefill_chunks(
    two_ranks, tmp_path, rows, max_tokens, expected
):
    """The rank with most prompts decides, unless another rank has fewer prompts than chunks."""
    assert two_ranks(num_prefill_chunks, tmp_path, rows, max_tokens) == [expected, expected]


def gather_with_little_memory(folder):
    """Return this rank's decision to gather where the second rank has too little memory."""
    with pytest.MonkeyPatch.context() as patch:
        rank = distributed.get_rank()
        free = [10**9, 10**5][rank]
        patch.setattr("lit_align.models.parallel.sharding.free_memory", lambda device: free)
        warning = pytest.warns(UserWarning, match="responses are generated from shards")
        with nullcontext() if rank else warning:  # only the first rank warns
            return sampled_responses(folder, None)[1]


def test_one_rank_without_memory_decides_for_all(two_ranks, tmp_path):
    assert two_ranks(gather_with_little_memory, tmp_path) == [False, False]


@pytest.mark.parametrize(("compute", "size"), [(None, 4), (torch.bfloat16, 2)])
def test_unsharded_size_counts_blocks_in_the_compute_dtype(compute, size):
    policy = tiny()
    blocks = sum(w.numel() for block in policy.blocks for w in block.parameters())
    rest = sum(w.numel() for w in policy.parameters()) - blocks
    assert unsharded_size(policy, policy.blocks, compute) == size * blocks + 4 * rest

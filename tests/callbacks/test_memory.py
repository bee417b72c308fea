"""Memory: exact bytes by phase and category, from the CPU allocator's events."""

import csv
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Callback
from spawn_ranks import Ranks
from tiny_models import Count, RandomPrompts, RandomTexts, tiny, trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.testing._internal.two_tensor import TwoTensor

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.sft import SFT
from lit_align.callbacks.memory import MIB, Memory
from lit_align.callbacks.progress import Progress
from lit_align.callbacks.reward import Reward
from lit_align.models.roles import single_head_role
from lit_align.runs.allocations import AcceleratorAllocations, CPUAllocations, storage_bytes

CPU = torch.device("cpu")
PHASES = ["load", "rollout", "score", "prepare", "update"]


def adam(params):
    return AdamW(params, lr=1e-2)


def size(*networks: nn.Module) -> int:
    """Return the bytes of the networks' weights in fp32."""
    return 4 * sum(weight.numel() for network in networks for weight in network.parameters())


def table(folder) -> dict[str, dict[str, int]]:
    """Return the rows of memory.csv by phase."""
    with (folder / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row.pop("phase"): {name: int(value) for name, value in row.items()} for row in rows}


@pytest.fixture
def allocations() -> Iterator[CPUAllocations]:
    allocations = CPUAllocations()
    allocations.start()
    yield allocations
    allocations.stop()


# The allocator -----------------------------------------------------------------------------------


def test_peak_is_most_bytes_at_once(allocations):
    allocations.begin()
    first = torch.empty(1000)
    second = torch.empty(500)
    del second
    third = torch.empty(250)
    assert allocations.end() == 6000
    allocations.begin()
    assert allocations.end() == 5000
    del first, third
    allocations.begin()
    assert allocations.end() == 0


def test_view_keeps_storage_of_its_base(allocations):
    base = torch.empty(1000)
    part = base[:10]
    del base
    allocations.begin()
    assert allocations.end() == 4000
    del part
    allocations.begin()
    assert allocations.end() == 0


def test_saved_tensors_count_until_backward(allocations):
    weight = torch.ones(1000, requires_grad=True)
    allocations.begin()
    loss = weight.exp().sum()
    assert allocations.end() == 4000 + 4000 + 4  # the weight, what exp saves, and the loss
    loss.backward()
    allocations.begin()
    assert allocations.end() == 4000 + 4000 + 4  # the weight, its gradient, and the loss
    del loss


def test_temporary_inside_operator_counts(allocations):
    tokens = torch.zeros(100, dtype=torch.int64)  # 800 bytes
    allocations.begin()
    same = torch.isin(tokens, tokens)
    peak = allocations.end()
    assert same.nbytes == 100
    assert peak >= 800 + 100 + 800  # it sorts a copy


def test_stopped_counter_ignores_allocations(allocations):
    allocations.stop()
    uncounted = torch.empty(1000)
    allocations.start()
    allocations.begin()
    kept = torch.empty(10)
    del uncounted
    assert allocations.end() == 40
    assert kept.nbytes == 40


def test_floor_is_not_counted_twice(allocations):
    kept = torch.empty(1000)
    allocations.raise_floor(5000)
    allocations.begin()
    assert allocations.end() == 5000
    allocations.raise_floor(4000)
    allocations.begin()
    assert allocations.end() == 5000
    del kept


def test_accelerator_counters_are_reset_and_read(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 7)
    device = torch.device("cuda", 0)
    allocations = AcceleratorAllocations(device)
    allocations.start()
    allocations.begin()
    assert allocations.end() == 7
    assert resets == [device]


def test_storage_counts_once_on_its_device():
    tensor = torch.empty(100)
    assert storage_bytes([tensor, tensor[:3], tensor.view(10, 10)], CPU) == 400
    assert storage_bytes([tensor, torch.empty(100, device="meta")], CPU) == 400
    assert storage_bytes([tensor], torch.device("cuda", 0)) == 0


def test_tensors_inside_wrapper_count():
    assert storage_bytes([TwoTensor(torch.empty(10), torch.empty(10))], CPU) == 80


# A run -------------------------------------------------------------------------------------------


def test_static_bytes_of_fp32_adamw(run, tmp_path):
    """Per weight: 4 bytes, 4 of its gradient, 8 of its moments. Per tensor: 4 of the step."""
    ppo = PPO(policy=tiny, optimizer=adam)
    run(ppo, callbacks=[Memory()])
    trained, frozen = size(ppo.policy, ppo.critic), size(ppo.reference)
    steps = 4 * sum(1 for role in ppo.roles.values() for _ in role.parameters())
    rows = table(tmp_path)
    assert list(rows) == PHASES
    assert [row["parameters"] for row in rows.values()] == [trained + frozen] * 5
    assert [row["gradients"] for row in rows.values()] == [0, 0, 0, 0, trained]
    assert rows["load"]["optimizer_state"] == 0
    assert [rows[phase]["optimizer_state"] for phase in PHASES[1:]] == [2 * trained + steps] * 4
    for row in rows.values():
        assert row["other"] == row["peak"] - sum(
            row[name] for name in ("parameters", "gradients", "optimizer_state")
        )
        assert row["other"] > 0


def test_sgd_has_no_optimizer_state(run, tmp_path):
    remax = ReMax(policy=tiny, optimizer=lambda params: SGD(params, lr=0.1))
    run(remax, callbacks=[Memory()])
    update = table(tmp_path)["update"]
    assert update["gradients"] == size(remax.policy)
    assert update["optimizer_state"] == 0


class Wasteful(ReMax):
    """ReMax that allocates and frees a block of `waste` bytes in one phase."""

    waste = 0

    def prepare(self, batch):
        torch.empty(self.waste, dtype=torch.uint8)
        return super().prepare(batch)


def test_block_raises_peak_of_its_phase_by_its_size(tmp_path):
    peaks = []
    for waste in (1_000_000, 1_234_567):
        wasteful = Wasteful(policy=tiny)
        wasteful.waste = waste
        torch.manual_seed(0)
        trainer(tmp_path, limit_val_batches=0, callbacks=[Memory()]).fit(wasteful, RandomPrompts(2))
        peaks.append({phase: row["peak"] for phase, row in table(tmp_path).items()})
    differences = {phase: peaks[1][phase] - peaks[0][phase] for phase in PHASES[1:]}
    assert differences == {"rollout": 0, "score": 0, "prepare": 234_567, "update": 0}


def test_offline_algorithm_has_three_phases(tmp_path):
    sft = SFT(policy=tiny, optimizer=adam)
    done = trainer(tmp_path, limit_val_batches=0)
    done.callbacks[:] = [Memory()]
    done.fit(sft, RandomTexts(2))
    rows = table(tmp_path)
    assert list(rows) == ["load", "prepare", "update"]
    assert rows["update"]["parameters"] == size(sft.policy)


class NetworkReward(Count):
    """Reward with a network that was built before the counter started."""

    def __init__(self):
        super().__init__()
        self.network = tiny().requires_grad_(False)

    def all_roles(self):
        return [single_head_role("reward", self.network)]


def test_parameters_include_reward_model(tmp_path):
    reward = NetworkReward()
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks[:] = [Memory(), run.callbacks[0], Reward(reward)]
    remax = ReMax(policy=tiny)
    run.fit(remax, RandomPrompts(2))
    weights = size(remax.policy, remax.reference, reward.network)
    for row in table(tmp_path).values():
        assert row["parameters"] == weights
        assert row["other"] >= 0


class AllocateInEvaluation(Callback):
    """Callback that allocates ten megabytes in evaluation."""

    def on_validation_batch_start(self, *hook):
        torch.empty(10_000_000, dtype=torch.uint8)


def test_evaluation_is_not_measured(run, tmp_path):
    run(ReMax(policy=tiny), val_check_interval=1, callbacks=[Memory(), AllocateInEvaluation()])
    assert all(row["peak"] < 10_000_000 for row in table(tmp_path).values())


def test_memory_between_iterations_is_constant(tmp_path):
    """The bytes in use between two iterations stay equal without evaluations."""
    memory, found = Memory(), []

    class Look(Callback):
        def on_train_batch_end(self, *hook):
            memory.allocations.begin()
            found.append(memory.allocations.bytes_in_use)

    grpo = GRPO(policy=tiny, num_samples=2, update_epochs=2, minibatch_size=4)
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[memory, Look()])
    run.fit(grpo, RandomPrompts(12))
    assert len(set(found[2:])) == 1


def test_largest_peak_of_run_is_written(tmp_path):
    wasteful = Wasteful(policy=tiny)

    class Less(Callback):
        def on_train_batch_start(self, trainer, algorithm, batch, batch_idx):
            algorithm.waste = [100_000, 3_000_000, 200_000][batch_idx]

    run = trainer(tmp_path, limit_val_batches=0, callbacks=[Memory(), Less()])
    run.fit(wasteful, RandomPrompts(3))
    assert table(tmp_path)["prepare"]["peak"] > 3_000_000
    last = run.callback_metrics["memory/prepare"] * MIB
    assert 200_000 < last < 3_000_000


def test_peaks_are_logged_and_shown(run, capsys, tmp_path):
    done = run(ReMax(policy=tiny), num_batches=1, callbacks=[Memory(), Progress()])
    rows, logged = table(tmp_path), done.callback_metrics
    for phase in PHASES:
        assert logged[f"memory/{phase}"] * MIB == pytest.approx(rows[phase]["peak"], rel=1e-6)
    most = max(row["peak"] for row in rows.values())
    assert logged["memory/peak"] * MIB == pytest.approx(most, rel=1e-6)
    assert f"memory/peak {most / MIB:.4g}" in capsys.readouterr().out
    shown = {name for name in done.progress_bar_metrics if name.startswith("memory/")}
    assert shown == {"memory/peak"}


class Failing(ReMax):
    def prepare(self, batch):
        raise RuntimeError("stop")


def test_failed_run_stops_the_profiler(tmp_path):
    failing = Failing(policy=tiny)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, callbacks=[Memory()]).fit(failing, RandomPrompts(1))
    assert not torch.autograd._profiler_enabled()
    assert failing.phase_listeners == []


def test_second_profiler_is_refused(tmp_path):
    run = trainer(tmp_path, profiler="pytorch", callbacks=[Memory()])
    with pytest.raises(ValueError, match=r"only one profiler can run\. Remove"):
        run.fit(ReMax(policy=tiny), RandomPrompts(1))


def test_second_fit_counts_existing_networks(tmp_path):
    remax, memory = ReMax(policy=tiny), Memory()
    for phases in (PHASES, PHASES[1:]):
        trainer(tmp_path, limit_val_batches=0, callbacks=[memory]).fit(remax, RandomPrompts(1))
        rows = table(tmp_path)
        assert list(rows) == phases
        assert all(row["other"] >= 0 for row in rows.values())
    assert remax.phase_listeners == []


def test_command_line_accepts_memory_without_profiler_output(tmp_path):
    line = ["fit", "--config", "remax", "--config", "toy", "--trainer.callbacks+", "Memory"]
    line += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    line += ["--data.batch_size", "4", "--data.max_rows", "8", "--rollout.max_new_tokens", "4"]
    command = [sys.executable, "-m", "lit_align.cli.main", *line]
    command += ["--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "memory/peak " in done.stdout
    assert "profiler_start" not in done.stdout + done.stderr
    assert list(table(tmp_path)) == PHASES


# Two ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    yield ranks
    ranks.close()


def sharded(folder):
    """Return the rows of this rank's file and its metrics."""
    remax = ReMax(policy=tiny, optimizer=adam)
    run = trainer(folder, limit_val_batches=0, devices=2, strategy="fsdp2", callbacks=[Memory()])
    run.fit(remax, RandomPrompts(2, 2))
    own = folder / f"rank{run.global_rank}"
    own.mkdir()
    (folder / f"memory.rank{run.global_rank}.csv").rename(own / "memory.csv")
    return table(own), {name: float(value) for name, value in run.callback_metrics.items()}


def test_ranks_count_shards_and_log_has_the_maximum(two_ranks, tmp_path):
    (first, logged), (second, same) = two_ranks(sharded, tmp_path)
    weights, tensors = size(tiny()), sum(1 for _ in tiny().parameters())
    update = [rows["update"] for rows in (first, second)]
    assert sum(row["parameters"] for row in update) == 2 * weights  # policy and reference
    assert sum(row["gradients"] for row in update) == weights
    assert sum(row["optimizer_state"] for row in update) == 2 * weights + 2 * 4 * tensors
    assert logged["memory/peak"] == same["memory/peak"]
    most = max(row["peak"] for rows in (first, second) for row in rows.values())
    assert max(logged[f"memory/{phase}"] for phase in PHASES) * MIB <= most

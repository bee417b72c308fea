"""Offloading of frozen models: off the device in the update, with equal results."""

import pytest
import torch
from test_spr_memory import Poison
from tiny_models import RandomPairs, RandomPrompts, scalar, tiny, trainer, weights
from torch.optim import AdamW

from lit_align.algorithms.dpo import DPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.rto import RTO
from lit_align.models.parallel import offload


def adam(params):
    return AdamW(params, lr=1e-2)


ALGORITHMS = {
    "ReMax": lambda **more: ReMax(policy=tiny, optimizer=adam, **more),
    "GRPO": lambda **more: GRPO(
        policy=tiny, num_samples=2, update_epochs=2, optimizer=adam, **more
    ),
    "PPO": lambda **more: PPO(policy=tiny, critic=scalar, optimizer=adam, **more),
    "RTO": lambda **more: RTO(
        policy=tiny, critic=scalar, dpo=tiny, dpo_reference=tiny, optimizer=adam, **more
    ),
    "DPO": lambda **more: DPO(policy=tiny, optimizer=adam, **more),
}


@pytest.fixture
def poisoned(monkeypatch):
    """Fills offloaded tensors with NaN, since a CPU has no other device to send them to."""
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)


def fit(folder, algorithm):
    """Return the policy's weights and the metrics of a run of two epochs."""
    torch.manual_seed(0)
    run = trainer(folder, max_epochs=2)
    if isinstance(algorithm, DPO):
        run.callbacks.clear()
    run.fit(algorithm, RandomPairs(2) if isinstance(algorithm, DPO) else RandomPrompts(2))
    return weights(algorithm.policy), run.callback_metrics


@pytest.mark.parametrize("name", ALGORITHMS)
def test_frozen_models_are_offloaded_in_every_update(tmp_path, poisoned, name):
    algorithm, is_offloaded = ALGORITHMS[name](), []
    losses = type(algorithm).losses

    def record_losses(self, batch):
        for role in self._modules:
            if role in ("reference", "dpo", "dpo_reference"):
                frozen = next(self._modules[role].parameters())
                is_offloaded.append(bool(frozen.isnan().all()))
        yield from losses(self, batch)

    algorithm.losses = record_losses.__get__(algorithm)
    fit(tmp_path, algorithm)
    assert len(is_offloaded) >= 4
    assert all(is_offloaded)


def test_one_frozen_model_is_on_the_device_at_a_time(tmp_path, poisoned):
    algorithm, found = ALGORITHMS["RTO"](), []
    frozen = ("dpo", "dpo_reference", "reference")

    def record_loaded(*call):
        first = {role: next(algorithm._modules[role].parameters()) for role in frozen}
        found.append([role for role in frozen if not first[role].isnan().any()])

    algorithm.configure_model()
    for role in frozen:
        algorithm._modules[role].register_forward_hook(record_loaded)
    torch.manual_seed(0)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(2))
    assert found == [[role] for role in frozen] * 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_offloading_changes_no_result(tmp_path, monkeypatch, name):
    expected, metrics = fit(tmp_path, ALGORITHMS[name](offload_frozen=False))
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)
    offloaded, offloaded_metrics = fit(tmp_path, ALGORITHMS[name]())
    assert all(map(torch.equal, expected, offloaded))
    assert metrics == offloaded_metrics

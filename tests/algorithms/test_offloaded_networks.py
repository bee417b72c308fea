"""Frozen models sleep through the update, and nothing that is computed changes."""

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
    """What sleeps is NaN on the spot, since a CPU has nowhere to send it."""
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)


def learnt(folder, algorithm):
    torch.manual_seed(0)
    run = trainer(folder, max_epochs=2)
    if isinstance(algorithm, DPO):
        run.callbacks.clear()
    run.fit(algorithm, RandomPairs(2) if isinstance(algorithm, DPO) else RandomPrompts(2))
    return weights(algorithm.policy), run.callback_metrics


@pytest.mark.parametrize("name", ALGORITHMS)
def test_frozen_models_sleep_through_every_update(tmp_path, poisoned, name):
    algorithm, asleep = ALGORITHMS[name](), []
    plain = type(algorithm).losses

    def watched(self, batch):
        for role in self._modules:
            if role in ("reference", "dpo", "dpo_reference"):
                frozen = next(self._modules[role].parameters())
                asleep.append(bool(frozen.isnan().all()))
        yield from plain(self, batch)

    algorithm.losses = watched.__get__(algorithm)
    learnt(tmp_path, algorithm)
    assert len(asleep) >= 4
    assert all(asleep)


def test_one_frozen_model_is_awake_at_a_time(tmp_path, poisoned):
    algorithm, found = ALGORITHMS["RTO"](), []
    frozen = ("dpo", "dpo_reference", "reference")

    def look(*call):
        awake = [r for r in frozen if not next(algorithm._modules[r].parameters()).isnan().any()]
        found.append(awake)

    algorithm.configure_model()
    for role in frozen:
        algorithm._modules[role].register_forward_hook(look)
    torch.manual_seed(0)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(2))
    assert found == [[role] for role in frozen] * 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_parking_changes_no_result(tmp_path, monkeypatch, name):
    awake, metrics = learnt(tmp_path, ALGORITHMS[name](offload_frozen=False))
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)
    parked, others = learnt(tmp_path, ALGORITHMS[name]())
    assert all(map(torch.equal, awake, parked))
    assert metrics == others

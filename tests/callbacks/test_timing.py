"""Timing: seconds by phase and tokens per second, with a fake clock."""

import pytest
from tiny_models import RandomTexts, tiny, trainer

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.sft import SFT
from lit_align.callbacks import timing
from lit_align.callbacks.timing import Timing


@pytest.fixture
def slow_clock(monkeypatch):
    """Replace the clock by one that advances 3 s per call."""
    moments = iter(range(0, 10**6, 3))
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(moments)))


def test_seconds_of_repeated_phase_are_summed(run, slow_clock):
    grpo = GRPO(policy=tiny, num_samples=2, update_epochs=2)
    done = run(grpo, num_batches=2, limit_val_batches=0, callbacks=[Timing()])
    values = done.callback_metrics
    found = {name: float(values[name]) for name in values if name.startswith("time/")}
    assert found == {
        "time/rollout": 3.0, "time/score": 3.0, "time/prepare": 3.0, "time/update": 6.0,
    }  # fmt: skip
    assert not grpo.phase_listeners


def test_offline_speed_counts_tokens_of_texts(tmp_path, slow_clock):
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[Timing()])
    run.callbacks[:] = [each for each in run.callbacks if isinstance(each, Timing)]
    run.fit(SFT(policy=tiny), RandomTexts(1))
    # 3 + 8 + 5 + 2 tokens in 3 s of prepare and 3 s of update
    assert float(run.callback_metrics["tokens_per_second"]) == pytest.approx(18 / 6)

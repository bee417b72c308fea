"""A run that is stopped inside an epoch and resumed equals the run that was not stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from run_cli import metrics, same

from lit_align.cli.main import main

ONLINE = ("remax", "grpo", "grpovi", "rloo", "ppo", "hydra_ppo", "joint_hydra_ppo", "rto", "spr")
ADAPTIVE = "--model.kl_target 1 --model.kl_horizon 50 --model.normalize_scores true"
BATCHES, STOPS = 4, (1, 6)  # in the first epoch of 4 batches, and in the second


class SaveAt(Callback):
    """Callback that saves after some batches of the run, as at a preemption."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.iteration in STOPS:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{module.iteration}.ckpt")


def fit(folder: Path, config: str, *more: str) -> None:
    """Run two epochs on 32 shuffled rows of the toy data, with a validation after each."""
    words = ["fit", "--config", config, "--config", "toy", "--trainer.max_epochs", "2"]
    words += ["--data.batch_size", str(32 // BATCHES), "--data.max_rows", "32"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.callbacks+", "test_resume_toy.SaveAt"]
    words += ["--rollout.max_new_tokens", "16"] if config in ONLINE else []
    assert main([*words, *more]) == 0


def last(folder: Path) -> dict[str, Any]:
    """Return the checkpoint at the end of the run."""
    (path,) = folder.glob("checkpoints/*.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("config", "num_workers", "stops"),
    [
        pytest.param("sft", 0, STOPS[1:], marks=pytest.mark.long),
        ("sft", 1, STOPS[1:]),
        pytest.param(
            "sft --config galore --model.optimizer.rank 16 --model.optimizer.update_gap 3",
            0,
            STOPS[1:],
            marks=pytest.mark.long,
        ),
        pytest.param("sft --config sltrain", 0, STOPS[1:], marks=pytest.mark.long),
        pytest.param("reward_model", 0, STOPS[1:], marks=pytest.mark.long),
        pytest.param("dpo", 0, STOPS[1:], marks=pytest.mark.long),
        ("dpo --model.precompute true", 0, STOPS[1:]),
        ("remax", 0, STOPS[1:]),
        pytest.param("remax", 0, STOPS[:1], marks=pytest.mark.long),
        pytest.param("grpo", 0, STOPS[1:], marks=pytest.mark.long),
        ("grpovi --model.running_bounds true", 0, STOPS[1:]),
        pytest.param("rloo", 0, STOPS[1:], marks=pytest.mark.long),
        (f"ppo {ADAPTIVE} --model.critic_warmup_iterations 2", 0, STOPS),
        pytest.param("spr", 0, STOPS[1:], marks=pytest.mark.long),
        ("spr --model.num_offline_samples 3 --model.offline_half_life 4", 1, STOPS[1:]),
        pytest.param("hydra_sft", 0, STOPS[1:], marks=pytest.mark.long),
        pytest.param("hydra_ppo", 0, STOPS[1:], marks=pytest.mark.long),
        pytest.param("joint_hydra_ppo", 0, STOPS[1:], marks=pytest.mark.long),
        pytest.param("rto", 0, STOPS[1:], marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_bitwise_equal(tmp_path, config, num_workers, stops):
    config, *flags = config.split()
    more = (*flags, "--data.num_workers", str(num_workers))
    fit(tmp_path / "long", config, *more)
    long, logged = last(tmp_path / "long"), metrics(tmp_path / "long")
    norms = [[v for k, v in row.items() if k.startswith("grad_norm")] for row in logged]
    assert len({tuple(norm) for norm in norms if norm}) == 2 * BATCHES
    for stop in stops:
        part, folder = tmp_path / "long" / f"{stop}.ckpt", tmp_path / str(stop)
        state = torch.load(part, weights_only=True)["state_dict"]
        assert not same(state, long["state_dict"])
        assert not any(name.startswith("reference") for name in state)
        fit(folder, config, *more, "--ckpt_path", str(part))
        resumed = last(folder)
        assert resumed["iteration"] == long["iteration"] == 2 * BATCHES
        for kept in ("state_dict", "optimizer_states"):
            assert same(resumed[kept], long[kept]), f"{kept} after {stop} batches"
        assert metrics(folder, stop) == metrics(tmp_path / "long", stop)

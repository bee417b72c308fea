"""Two sharded ranks that resume inside an epoch equal two that were never stopped."""

import re
import shutil

import pytest
from run_cli import FSDP2, checkpoint_argv, fit_argv, last, metrics, run, same, succeed

from lit_align.runs.checkpoint_files import list_checkpoints, newest_readable

PPO = ("--model.kl_target=0.1", "--model.kl_horizon=50", "--model.normalize_scores=true")
OFFLINE = ("--model.num_offline_samples=3", "--model.offline_half_life=4")
LORA = ("--config=lora", "--model.policy.lora.r=4")
WORKERS = ("--data.num_workers=1",)
RUNS = {
    "sft": ("sft", WORKERS),
    "sft, GaLore": (
        "sft", ("--config=galore", "--model.optimizer.rank=16", "--model.optimizer.update_gap=3")),
    "sft, SLTrain": ("sft", ("--config=sltrain",)),
    "reward_model": ("reward_model", WORKERS),
    "dpo": ("dpo", LORA),
    "dpo, precomputed": ("dpo", ("--model.precompute=true",)),
    "remax": ("remax", WORKERS),
    "grpo": ("grpo", ("--model.minibatch_size=4", "--model.update_epochs=2")),
    "grpovi": ("grpovi", ("--model.running_bounds=true",)),
    "rloo": ("rloo", LORA),
    "ppo": ("ppo", PPO),
    "dynamic_lora_ppo": ("dynamic_lora_ppo", ()),
    "spr": ("spr", (*OFFLINE, *WORKERS)),
    "hydra_sft": ("hydra_sft", ()),
    "hydra_ppo": ("hydra_ppo", PPO),
    "joint_hydra_ppo": ("joint_hydra_ppo", ()),
    "rto": ("rto", ()),
}  # fmt: skip
FIRST_TIER = {"ppo"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST_TIER else pytest.mark.long) for n in RUNS]
)
def test_a_sharded_resume_is_bitwise_equal(tmp_path, name):
    config, more = RUNS[name]
    more = (*FSDP2, *more, *checkpoint_argv(2, 9))
    long, parts, log = tmp_path / "long", tmp_path / "parts", tmp_path / "log"
    succeed(fit_argv(long, config, *more), log, 2)
    middle = long / "checkpoints" / "iteration_000006.ckpt"  # of four in an epoch
    assert middle.is_dir()
    succeed(fit_argv(parts, config, *more, f"--ckpt_path={middle}"), log, 2)
    mine, theirs = last(parts), last(long)
    assert mine["iteration"] == theirs["iteration"] == 8
    for part in ("state_dict", "optimizer_states"):
        assert same(mine[part], theirs[part]), part
    rows = [row for row in metrics(long) if int(row["step"]) >= int(metrics(parts)[0]["step"])]
    assert metrics(parts) == rows
    norms = {v for row in rows for k, v in row.items() if k.startswith("grad_norm")}
    assert len(norms) >= 2  # the gradients are not constant


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Folder of a sharded run of one epoch, saved after two and after four iterations."""
    folder = tmp_path_factory.mktemp("half")
    succeed(
        fit_argv(folder / "run", "sft", *FSDP2, *checkpoint_argv(2), epochs=1), folder / "log", 2
    )
    return folder / "run"


def shorten(path):
    (shard, *_) = sorted(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_a_shard(path):
    sorted(path.glob("*.distcp"))[0].unlink()


def lose_the_index(path):
    (path / ".metadata").unlink()


def lose_the_header(path):
    (path / "meta.pt").unlink()


@pytest.mark.parametrize("damage", [shorten, lose_a_shard, lose_the_index, lose_the_header])
def test_an_incomplete_sharded_checkpoint_is_skipped(half, tmp_path, damage):
    folder = shutil.copytree(half, tmp_path / "run") / "checkpoints"
    older, newer = list_checkpoints(folder)
    assert newest_readable(folder) == (newer, [])
    damage(newer)
    found, (complaint,) = newest_readable(folder)
    assert found == older
    assert complaint.startswith(f"{newer} cannot be read: ")


@pytest.mark.long
def test_a_run_resumes_from_the_newest_complete_folder(half, tmp_path):
    folder, log = shutil.copytree(half, tmp_path / "run"), tmp_path / "log"
    older, newer = list_checkpoints(folder / "checkpoints")
    shorten(newer)
    assert set(run(fit_argv(folder, "sft", *FSDP2, f"--ckpt_path={newer}"), log, 2)) <= {2, -9}
    assert f"lit-align: {newer} cannot be read: " in log.read_text()
    printed = succeed(fit_argv(folder, "sft", *FSDP2, "--ckpt_path=last"), log, 2)
    assert f"resuming from {older}, iteration 2" in printed
    assert last(folder)["iteration"] == 8


@pytest.mark.parametrize(
    ("config", "more", "reason"),
    [
        ("sft", LORA, "does not fit this model"),
        pytest.param(
            "sft",
            ("--model.policy.config.hidden_size=32",),
            "does not fit this model",
            marks=pytest.mark.long,
        ),
        pytest.param("reward_model", (), "does not fit this model", marks=pytest.mark.long),
        ("remax", (), "was trained with SFT and cannot resume with ReMax"),
    ],
)
def test_a_sharded_checkpoint_of_another_model_is_refused(half, tmp_path, config, more, reason):
    (*_, path) = list_checkpoints(half / "checkpoints")
    argv = fit_argv(tmp_path / "run", config, *FSDP2, *more, f"--ckpt_path={path}")
    assert set(run(argv, tmp_path / "log", 2)) <= {2, -9}
    printed = (tmp_path / "log").read_text()
    assert re.search(rf"^lit-align: The checkpoint {reason}", printed, re.MULTILINE)

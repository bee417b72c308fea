"""Every packaged config runs, and every overlay applies to each of them."""

import csv
from typing import Any

import pytest
import yaml
from tiny_models import tiny

from lit_align.algorithms.remax import ReMax
from lit_align.cli.discovery import import_all
from lit_align.cli.main import main
from lit_align.cli.overlays import packaged_configs, read_config, resolve_configs

OVERLAYS = [
    name
    for name in packaged_configs()
    if "class_path" not in (read_config(name).get("model") or {})
]
CONFIGS = [name for name in packaged_configs() if name not in OVERLAYS]
KINDS = {"sft", "dpo", "remax", "ppo"}  # texts, pairs, online, and online with a critic
FEW = [
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "."),
    *("--data.batch_size", "4", "--data.max_rows", "32", "--trainer.enable_checkpointing", "false"),
    *("--trainer.default_root_dir", "run"),
]


def tier(config: str) -> Any:
    """Return the mark of a config: only one of each kind is in the first tier."""
    return () if config in KINDS else pytest.mark.long


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in a folder of the test."""
    monkeypatch.chdir(tmp_path)


def fit(*names: str) -> list[dict[str, str]]:
    """Return the rows of metrics.csv of a short run."""
    configs = [word for name in names for word in ("--config", name)]
    assert main(["fit", *configs, *FEW]) == 0
    with open("lightning_logs/version_0/metrics.csv") as file:
        return list(csv.DictReader(file))


def num_logged(rows: list[dict[str, str]], name: str) -> int:
    return sum(bool(row.get(name)) for row in rows)


def test_configs_and_overlays_are_found():
    assert {"sft", "reward_model", "remax"} <= set(CONFIGS)
    assert {"toy", "lora", "fsdp"} <= set(OVERLAYS)


@pytest.mark.parametrize(
    ("config", "overlays"),
    [pytest.param(name, ("toy",), id=f"{name}-toy") for name in CONFIGS]
    + [
        pytest.param(name, ("toy", "lora"), marks=tier(name), id=f"{name}-lora") for name in CONFIGS
    ],
)
def test_a_config_runs_on_toy_data(config, overlays):
    rows = fit(config, *overlays)
    norms = [name for name in rows[0] if name.startswith("grad_norm")]
    assert [num_logged(rows, name) for name in ("loss", *norms)] == [2] * (1 + len(norms))
    assert norms
    assert num_logged(rows, "val/reward") + num_logged(rows, "val/loss") == 1


@pytest.mark.parametrize("overlays", [("toy",), ("toy", "lora")], ids="+".join)
def test_the_reference_is_the_initial_policy(overlays):
    first, second = fit("remax", *overlays)[:2]
    assert float(first["kl/per_response_k1"]) == 0
    assert float(second["kl/per_response_k1"]) != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("config", [pytest.param(name, marks=tier(name)) for name in CONFIGS])
def test_an_overlay_parses_over_each_config(config, overlay, capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", config, "--config", overlay, "--print_config"])
    assert left.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for key, value in (read_config(overlay).get("trainer") or {}).items():
        if not isinstance(value, dict):
            assert printed["trainer"][key] == value


def test_an_overlay_applies_only_existing_keys():
    import_all()
    line = resolve_configs(["fit", "--config", "sft", "--config", "toy"])
    toy = yaml.safe_load(line[4])
    assert {"policy", "optimizer", "warmup_ratio"} <= set(toy["model"]["init_args"])
    assert not {"reward_model", "kl_coef"} & set(toy["model"]["init_args"])
    assert not {"rollout", "reward"} & set(toy)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_starts_with_a_comment_and_is_short(config):
    lines = packaged_configs()[config].splitlines()
    assert lines[0].startswith("# ")
    assert 20 <= len(lines) <= 50


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_line_overrides_a_config(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--model.max_grad_norm", "0.125", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["max_grad_norm"] == 0.125


def test_class_defaults_of_remax_follow_arxiv_2310_10505():
    algorithm = ReMax(policy=tiny)
    assert (algorithm.kl_coef, algorithm.kl_to_go) == (0.1, False)  # part I, one-step
    assert (algorithm.gamma, algorithm.advantage_clip) == (1.0, None)
    assert algorithm.loss_aggregation == "sequence_sum"
    assert (algorithm.num_samples, algorithm.uses_greedy_baseline, algorithm.update_epochs) == (
        1,
        True,
        1,
    )
    assert (algorithm.warmup_ratio, algorithm.final_lr_ratio) == (0.0, 1.0)


def test_remax_yaml_has_the_settings_of_the_papers_experiments():
    settings = read_config("remax")["model"]["init_args"]
    assert (settings["kl_coef"], settings["kl_to_go"]) == (0.01, True)
    assert settings["optimizer"]["init_args"]["lr"] == 5e-7
    assert read_config("remax")["rollout"]["init_args"]["max_new_tokens"] == 384

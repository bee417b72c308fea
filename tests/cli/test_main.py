"""The command line: help, packaged configs, overlays, and which setting wins."""

import json
import subprocess
import sys

import pytest
import yaml

from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.reward_model import RewardModel
from lit_align.cli.discovery import import_all, init_arguments
from lit_align.cli.main import TOOLS, TRAINER_COMMANDS, main
from lit_align.cli.overlays import (
    SECTIONS,
    chosen_class,
    drop_unsupported,
    packaged_configs,
    read_config,
    resolve_configs,
    to_inline_yaml,
)
from lit_align.data.preferences import PreferenceData
from lit_align.version import __version__

FAST = ("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")


@pytest.fixture(autouse=True)
def all_imported():
    import_all()


def printed_config(capsys, *argv: str) -> dict:
    """Return the config that --print_config prints for a command."""
    with pytest.raises(SystemExit) as end:
        main([*argv, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-align {__version__}\n"


@pytest.mark.parametrize("command", [[], ["fit"], ["predict"], ["configs"]])
def test_help_has_status_0(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(main([*command, "--help"]))
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_lists_all_commands_by_group(argv, capsys):
    assert main(argv) == 0
    training, _, tools = capsys.readouterr().out.partition("Tools:")
    assert all(f"\n  {name} " in training for name in TRAINER_COMMANDS)
    assert all(f"\n  {name} " in tools for name in TOOLS)


def test_the_help_of_an_algorithm_is_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "ReMax"])
    text = " ".join(capsys.readouterr().out.split())
    assert "KL penalty: reward subtracted per nat of log-ratio to the reference" in text
    assert "Padded tokens per forward pass" in text


def test_the_version_does_not_import_torch():
    code = (
        "import sys; from lit_align.cli.main import main; main(['--version']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configs_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "list"]) == 0
    recipes, _, overlays = capsys.readouterr().out.partition("Overlays")
    assert "  remax " in recipes
    assert "  lora " in overlays
    assert all(f"  {name} " in recipes + overlays for name in packaged_configs())
    assert main(["configs", "copy", "remax", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == packaged_configs()["remax"]
    assert read_config("mine.yaml")["model"]["class_path"] == "ReMax"
    assert main(["configs", "copy", "remax", "mine.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_later_config_and_the_command_line_override_a_config(capsys, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model: {init_args: {kl_coef: 0.7, num_samples: 3}}")
    config = printed_config(
        capsys, "fit", "--config", "remax", "--config", str(overlay), "--model.kl_coef", "0.9"
    )
    settings = config["model"]["init_args"]
    assert (settings["kl_coef"], settings["num_samples"]) == (0.9, 3)
    assert settings["policy"]["init_args"]["path"] == "mistralai/Mistral-7B-Instruct-v0.2"


def test_sections_accept_short_class_names(capsys):
    config = printed_config(
        capsys, "fit", "--config", "remax", "--rollout.max_new_tokens", "77",
        "--reward.functions", "Length", "--reward.functions.target", "9",
    )  # fmt: skip
    assert config["rollout"]["init_args"]["max_new_tokens"] == 77
    assert config["reward"]["init_args"]["functions"]["class_path"].endswith(".Length")
    assert config["reward"]["init_args"]["functions"]["init_args"]["target"] == 9


def test_settings_of_an_overlay_that_the_class_does_not_have_are_dropped():
    overlay = {
        "model": {"init_args": {"policy": 1, "reward_model": 2, "max_grad_norm": 3, "typo": 4}},
        "data": {"init_args": {"max_tokens": 5, "max_prompt_tokens": 6}},
        "rollout": {"class_path": "Rollout"},
    }
    remaining = drop_unsupported(overlay, {"model": RewardModel, "data": PreferenceData})
    assert remaining["model"]["init_args"] == {"reward_model": 2, "max_grad_norm": 3, "typo": 4}
    assert remaining["data"]["init_args"] == {"max_tokens": 5}
    assert "rollout" not in remaining
    assert drop_unsupported(overlay, {"model": ReMax, "data": None})["rollout"] == {
        "class_path": "Rollout"
    }


def test_overlays_are_cut_to_the_class_of_the_command_line():
    argv = ["fit", "--config", "remax", "--model", "SFT"]
    assert chosen_class("model", SECTIONS["model"], [read_config("remax")], argv).__name__ == "SFT"
    argv = resolve_configs(["fit", "--config=sft", "--config", "toy"])
    assert argv[1] == "--config"
    overlay = yaml.safe_load(argv[4])
    assert "rollout" not in overlay
    assert "kl_coef" not in overlay["model"]["init_args"]


def test_a_config_may_contain_infinity(tmp_path, capsys):
    """The `config.yaml` of a run without clipping has it."""
    file = tmp_path / "unclipped.yaml"
    file.write_text("model: {init_args: {max_grad_norm: .inf, optimizer: {init_args: {lr: 1e-3}}}}")
    line = ["fit", "--config", "sft", "--config", "toy", "--config", str(file), "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        main(line)
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["max_grad_norm"] == float("inf")
    assert settings["optimizer"]["init_args"]["lr"] == 0.001


@pytest.mark.parametrize("text", ["two\nlines: {{ x }}", "1e3", "null", "é", "a" * 500, ""])
def test_texts_of_a_config_are_unchanged(text):
    assert yaml.safe_load(to_inline_yaml({"data": {"init_args": {"chat_template": text}}})) == {
        "data": {"init_args": {"chat_template": text}}
    }


def test_arguments_include_those_of_parents():
    assert {"kl_coef", "policy", "update_epochs", "microbatch_tokens"} <= init_arguments(ReMax)
    assert "kwargs" not in init_arguments(ReMax)


def test_predict_writes_completions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["predict", "--config", "remax", "--config", "toy", "--data.max_rows", "8",
          "--trainer.limit_predict_batches", "1", "--trainer.default_root_dir", "out"])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert len(rows) == 8
    assert {"prompt", "completion", "score", "kl", "length", "truncated"} <= set(rows[0])
    assert all(row["kl"] == 0.0 for row in rows)  # policy and reference start the same


def test_a_run_prints_its_batch_and_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "remax", "--config", "toy", *FAST, "--model.num_samples", "3",
          "--trainer.limit_train_batches", "2"])  # fmt: skip
    output = capsys.readouterr().out
    assert "64 prompts x 3 samples + 64 greedy = 256 rows per rollout and rank; 1 rank(s)" in output
    assert "stop token ids: [3]" in output
    run = tmp_path / "runs" / "remax"
    assert {"metrics.csv", "config.yaml", "curves.png", "hf"} <= {p.name for p in run.iterdir()}


def test_the_command_line_overrides_the_settings_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ("fit", "--config", "sft", "--config", "toy", *FAST)
    main([*start, "--trainer.default_root_dir", "one"])
    (checkpoint,) = (tmp_path / "one" / "checkpoints").glob("*.ckpt")
    main([*start, "--trainer.default_root_dir", "two", "--trainer.max_epochs", "2",
          "--model.max_grad_norm", "0.5", "--ckpt_path", str(checkpoint)])  # fmt: skip
    config = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert config["model"]["init_args"]["max_grad_norm"] == 0.5


def test_an_overlay_may_set_a_class_and_a_section_may_be_a_class_name(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text(
        "data: {class_path: PreferenceData, init_args: {path: mine}}"
    )
    argv = resolve_configs(["fit", "--config", "sft", "--config", str(tmp_path / "data.yaml")])
    assert yaml.safe_load(argv[4])["data"]["class_path"] == "PreferenceData"
    (tmp_path / "short.yaml").write_text("model: SFT\ndata: InstructionData")
    argv = resolve_configs(["fit", "--config", str(tmp_path / "short.yaml"), "--model=ReMax"])
    assert yaml.safe_load(argv[2])["model"] == {"class_path": "SFT"}
    assert argv[3:] == ["--model", "ReMax"]


def test_validate_and_predict_do_not_overwrite_the_files_of_a_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ("--config", "remax", "--config", "toy", "--data.max_rows", "64")
    main(["fit", *start, *FAST])
    run = tmp_path / "runs" / "remax"
    before = {name: (run / name).read_text() for name in ("metrics.csv", "config.yaml")}
    main(["validate", *start, "--trainer.limit_val_batches", "1"])
    main(["predict", *start, "--trainer.limit_predict_batches", "1"])
    assert before == {name: (run / name).read_text() for name in before}


def test_an_index_error_of_a_users_algorithm_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(
        "from lit_align.algorithms.remax import ReMax\n"
        "class Broken(ReMax):\n"
        "    def prepare(self, batch):\n"
        "        batch = super().prepare(batch)\n"
        "        batch.advantages = batch.advantages.new_zeros(3, 2)\n"
        "        return batch\n"
    )
    with pytest.raises(IndexError, match="out of bounds"):
        main(["fit", "--config", "remax", "--config", "toy", *FAST, "--model", "broken.Broken"])


def test_a_data_file_is_not_read_as_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("prompt,answer\na film,b\nthe film,c\n")
    start = ("predict", "--config", "remax", "--config", "toy", "--data.eval_split", "null")
    assert main([*start, "--data.path", "toy", "--data.eval_path", "mine.csv"]) == 0
    found = (tmp_path / "runs" / "remax" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in found] == ["b", "c"]
    assert main([*start, "--data.path", "mine.csv", "--data.eval_fraction", "0.5"]) == 0

"""docs/from_trl.md: its names exist, and its example runs."""

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from lit_align.cli.main import main
from lit_align.runs.run_folder import flatten_settings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from_trl.md").read_text()
EXAMPLE = ROOT / "docs" / "examples" / "from_trl.py"


def config_keys(capsys, *config: str) -> set[str]:
    """Return the dotted names that --print_config prints."""
    with pytest.raises(SystemExit):
        main(["fit", *config, "--print_config"])
    names = flatten_settings(yaml.safe_load(capsys.readouterr().out))
    return {".".join(name.split(".")[:k]) for name in names for k in range(1, 6)}


def test_each_name_on_our_side_of_the_tables_exists(capsys):
    online = config_keys(capsys, "--config", "grpo", "--config", "lora")
    known = online | config_keys(capsys, "--config", "dpo", "--config", "lora")
    ours = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| `")]
    names = {name for cell in ours for name in re.findall(r"`((?:\w+\.)+\w+)`", cell)}
    assert len(names) > 25
    assert names <= known


def test_the_reward_function_has_the_signature_of_trl():
    brevity = runpy.run_path(str(EXAMPLE))["brevity"]
    rows = {"prompts": ["p", "p"], "completions": ["a b c", "a"], "max_words": [1, 1]}
    assert brevity(**rows) == [-2, 0]


@pytest.mark.parametrize("side", ["lit_align", "trl"])
def test_the_example_runs(side, tmp_path, monkeypatch):
    if side == "trl":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLE))
    example[f"with_{side}"](*example["prepare"]())
    if side == "lit_align":
        metrics = (tmp_path / "runs/from_trl/lit_align/metrics.csv").read_text().splitlines()
        assert len(metrics) == 3
        config = yaml.safe_load((tmp_path / "runs/from_trl/lit_align/config.yaml").read_text())
        assert config["model"]["init_args"]["num_samples"] == 4
    first = json.loads((tmp_path / "runs/from_trl/prompts.jsonl").read_text().splitlines()[0])
    assert set(first) == {"prompt", "max_words"}

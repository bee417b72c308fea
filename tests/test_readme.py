"""The Python code of the README runs."""

import re
from pathlib import Path

import pytest
import torch

from lit_align.cli.main import main
from lit_align.cli.overlays import read_config
from lit_align.data.text import load_tokenizer
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A folder with untrained models in place of those of the quickstart."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = read_config("toy")["model"]["init_args"]["policy"]["init_args"]["config"]
    for name, network in (
        ("1_sft", Policy(config=config)),
        ("2_reward_model", ScalarHead(config=config)),
    ):
        network.save(tmp_path / "runs" / "quickstart" / name / "hf")
        load_tokenizer("toy").save_pretrained(tmp_path / "runs" / "quickstart" / name / "hf")
    return tmp_path


def test_the_run_in_python(quickstart):
    code = BLOCKS[0].replace("max_epochs=1", "max_epochs=1, limit_train_batches=2, logger=False")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["remax"].iteration == 2


def test_the_subclass_runs_by_its_import_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_remax.py").write_text(BLOCKS[1])
    (command,) = re.findall(r"    lit-align (fit --config remax --config toy --model my.*)", README)
    main(
        [*command.split(), "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    )
    config = (tmp_path / "runs" / "remax" / "config.yaml").read_text()
    assert "token_cost: 0.05" in config
    assert len(BLOCKS[1].strip().splitlines()) <= 14

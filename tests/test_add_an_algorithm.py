"""docs/add_an_algorithm.md: its two files and its commands run as printed."""

import os
import re
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
from run_cli import run

PAGE = (Path(__file__).parents[1] / "docs" / "add_an_algorithm.md").read_text()
FEW = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --data.max_rows 32"
FEW += " --data.batch_size 4 --trainer.enable_checkpointing false --trainer.default_root_dir run"


def block(first: str) -> str:
    """Return the indented block of the page that starts with a line."""
    found = re.search(rf"^    {re.escape(first)}.*?\n(?=\S)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, first
    return dedent(found[0])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder with the page's two files."""
    (tmp_path / "my_module.py").write_text(block('"""RAFT'))
    (tmp_path / "my_config.yaml").write_text(block("# RAFT: best of 4"))
    return tmp_path


def commands() -> list[str]:
    return re.findall(r"^    lit-align (.*)$", PAGE, re.MULTILINE)


def output_of(folder: Path, words: list[str]) -> str:
    """Return the output of a command in the folder."""
    log = folder / "log"
    assert run(words, log, before=partial(os.chdir, folder)) == [0], log.read_text()
    return log.read_text()


def test_the_class_is_thirty_lines_long():
    lines = block('"""RAFT').splitlines()
    assert len([line for line in lines if line.strip()]) <= 34


def test_the_help_comes_from_the_docstring(folder):
    (words,) = [command.split() for command in commands() if "help" in command]
    assert "Samples per prompt, of which one is learnt" in output_of(folder, words)


@pytest.mark.parametrize("number", [0, 1])
def test_the_algorithm_runs(folder, number):
    trained = [command.split() for command in commands() if "help" not in command][number]
    printed = output_of(folder, [*trained, *FEW.split()])
    assert "prompts x 8 samples = 32 rows" in printed or "prompts x 4 samples = 16 rows" in printed
    assert "val/reward" in printed
    assert (folder / "run" / "hf" / "model.safetensors").is_file()

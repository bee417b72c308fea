"""The examples on real input: each parses and runs, and reaches what docs/quickstart.md says."""

import csv
import re
import runpy
from pathlib import Path

import pytest
from tiny_models import SHARED

from lit_align.cli.main import main

ROOT = Path(__file__).parents[1]
EXAMPLES = {file.stem: file for file in sorted((ROOT / "docs" / "examples").glob("real_*.yaml"))}
BASE = "../shared/models/stories260K"
FEW = [
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
    *("--data.batch_size", "4", "--data.eval_batch_size", "4", "--data.max_rows", "40"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The examples' paths are relative to the project."""
    if not (SHARED / "models" / "stories260K").is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("the shared real data and the shared real model are not here")
    monkeypatch.chdir(ROOT)


def run(command: str, example: str, folder: Path, *more: str) -> dict[str, float]:
    """Runs an example's command; the last value of each metric that it logged."""
    words = ["--config", str(EXAMPLES[example]), "--trainer.default_root_dir", str(folder), *more]
    assert main([command, *words]) == 0
    last = {}
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                last |= {name: float(value) for name, value in row.items() if value}
    return last


def predictions(example: str, folder: Path, *more: str) -> list[dict]:
    """The answers of a model to the held-out prompts."""
    script = runpy.run_path(str(ROOT / "scripts" / "compare_predictions.py"))
    run("predict", example, folder, *more)
    return script["read"](folder / "predictions.jsonl")


def test_there_are_four_examples():
    assert list(EXAMPLES) == ["real_digits", "real_remax", "real_reward_model", "real_sft"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_one_screen_and_runs(example, tmp_path):
    text = EXAMPLES[example].read_text()
    assert text.startswith("# Real input (")
    assert len(text.splitlines()) <= 60
    last = run("fit", example, tmp_path, *FEW)
    assert last["step"] == 1
    assert {"val/loss", "val/reward"} & set(last)
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_sft_learns_the_stories(tmp_path, capsys):
    run("validate", "real_sft", tmp_path / "before")
    (before,) = re.findall(r"val/perplexity (\d+\.\d+)", capsys.readouterr().out)
    after = run("fit", "real_sft", tmp_path / "after")
    assert float(before) > 9
    assert after["val/perplexity"] < 5


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_reward_model_knows_held_out_reviews(tmp_path):
    last = run("fit", "real_reward_model", tmp_path)
    assert last["val/accuracy"] > 0.7


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_remax_makes_stories_cheerful(tmp_path):
    """By the measure of the quickstart; its start model is the reference."""
    run("fit", "real_remax", tmp_path)
    before = predictions("real_remax", tmp_path / "before")
    start = ("--model.reference", "Policy", "--model.reference.path", BASE)
    aligned = ("--model.policy.path", str(tmp_path / "hf"), *start)
    after = predictions("real_remax", tmp_path / "after", *aligned)
    script = runpy.run_path(str(ROOT / "scripts" / "compare_predictions.py"))
    figures = script["summarise"](before, after)
    assert figures["prompts"] >= 200
    assert figures["gain in standard deviations"] >= 1
    assert figures["gain, 95 % low"] > 0
    assert figures["KL after, nats per response"] <= 20
    assert figures["distinct-2 after"] > figures["distinct-2 before"] / 2


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_remax_learns_to_count_from_random_weights(tmp_path):
    last = run("fit", "real_digits", tmp_path)
    assert last["reward"] > 0.2
    assert last["val/reward"] > 0.2

"""The examples on real input: each parses, runs, and reaches the figures of docs/quickstart.md.

The stories and reviews of the examples are on the hub. Here the overlays of tests/real_data replace
them by the reference data. The digits are generated.
"""

import csv
import re
import runpy
from pathlib import Path

import pytest
from tiny_models import SHARED

from lit_align.cli.main import main

ROOT = Path(__file__).parents[1]
EXAMPLES = {file.stem: file for file in sorted((ROOT / "docs" / "examples").glob("real_*.yaml"))}
OVERLAYS = {file.stem: file for file in sorted((ROOT / "tests" / "real_data").glob("real_*.yaml"))}
BASE = "../shared/models/stories260K"
FEW = [
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
    *("--data.batch_size", "4", "--data.eval_batch_size", "4", "--data.max_rows", "40"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Change to the project folder: the paths of the examples are relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Options that replace the folder of the generated prompts by a temporary one."""
    folder = tmp_path_factory.mktemp("digits")
    script = runpy.run_path(str(ROOT / "docs" / "examples" / "digits.py"))
    prompts = script["make_prompts"]()
    script["write"](prompts[script["NUM_TEST"] :], folder / "train.jsonl")
    script["write"](prompts[: script["NUM_TEST"]], folder / "test.jsonl")
    return (
        *("--data.path", str(folder / "train.jsonl")),
        *("--data.eval_path", str(folder / "test.jsonl")),
    )


def skip_without_reference_data() -> None:
    """Skip a test where the folder ../shared is absent, as in most clones."""
    if not (SHARED / "models" / "stories260K").is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("the reference data folder ../shared is not here")


def config_options(example: str) -> list[str]:
    """Return the options of an example, with the overlay that needs no network."""
    options = ["--config", str(EXAMPLES[example])]
    if example in OVERLAYS:
        skip_without_reference_data()
        options += ["--config", str(OVERLAYS[example])]
    return options


def run(command: str, example: str, folder: Path, *more: str) -> dict[str, float]:
    """Run a command with an example and return the last value of each logged metric."""
    words = [*config_options(example), "--trainer.default_root_dir", str(folder), *more]
    assert main([command, *words]) == 0
    last = {}
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                last |= {name: float(value) for name, value in row.items() if value}
    return last


def predictions(example: str, folder: Path, *more: str) -> list[dict]:
    """Return a model's responses to the held-out prompts."""
    script = runpy.run_path(str(ROOT / "scripts" / "compare_predictions.py"))
    run("predict", example, folder, *more)
    return script["read"](folder / "predictions.jsonl")


def test_there_are_four_examples():
    assert list(EXAMPLES) == ["real_digits", "real_remax", "real_reward_model", "real_sft"]
    assert set(OVERLAYS) == set(EXAMPLES) - {"real_digits"}


def test_the_digit_prompts_are_all_different():
    prompts = runpy.run_path(str(ROOT / "docs" / "examples" / "digits.py"))["make_prompts"]()
    assert len(set(prompts)) == len(prompts) == 10 * 9 * 9


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_parses_as_it_is(example, capsys):
    text = EXAMPLES[example].read_text()
    assert text.startswith("# Real input (")
    assert len(text.splitlines()) <= 60
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(EXAMPLES[example]), "--print_config"])
    assert end.value.code in (0, None)
    assert f"default_root_dir: runs/{example}" in capsys.readouterr().out


@pytest.mark.parametrize("example", [*EXAMPLES, "stories"])
def test_an_example_needs_no_file_that_a_clone_lacks(example):
    text = (ROOT / "docs" / "examples" / f"{example}.yaml").read_text()
    assert "../" not in text
    for name in re.findall(r"docs/examples/\w+(?:\.\w+)?", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, tmp_path, digits):
    more = digits if example == "real_digits" else ()
    last = run("fit", example, tmp_path, *FEW, *more)
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
    figures = script["summarize"](before, after)
    assert figures["prompts"] >= 200
    assert figures["gain in standard deviations"] >= 1
    assert figures["gain, 95 % low"] > 0
    assert figures["KL after, nats per response"] <= 20
    assert figures["distinct-2 after"] > figures["distinct-2 before"] / 2


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_remax_learns_to_count_from_random_weights(tmp_path, digits):
    last = run("fit", "real_digits", tmp_path, *digits)
    assert last["reward"] > 0.2
    assert last["val/reward"] > 0.2

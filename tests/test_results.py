"""docs/results.md: every online algorithm is in its table, and its script runs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from tiny_models import SHARED

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.cli.configs import packaged_configs
from lit_align.cli.discovery import concrete_subclasses, import_all
from lit_align.cli.overlays import read_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text()


@pytest.fixture
def results(monkeypatch):
    """Script as a module, run in the project folder."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(ROOT)
    return importlib.import_module("results")


def algorithms() -> set[str]:
    """Return the names of the package's concrete online algorithms."""
    import_all()
    ours = [
        kind
        for kind in concrete_subclasses(OnlineAlgorithm)
        if kind.__module__.startswith("lit_align.")
    ]
    return {kind.__name__ for kind in ours if not is_abstract(kind)}


def is_abstract(kind: type) -> bool:
    methods = (inspect.getattr_static(kind, name) for name in dir(kind))
    return any(getattr(method, "__isabstractmethod__", False) for method in methods)


def table_rows() -> dict[str, list[str]]:
    """Return the cells of the table by title."""
    made = PAGE.partition("<!-- made by scripts/results.py -->")[2].partition("<!-- end -->")[0]
    lines = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("| ")]
    return {title: cells for title, *cells in lines[1:]}


def test_every_online_algorithm_has_a_row():
    assert {title.partition(",")[0] for title in table_rows()} == algorithms()


def test_every_row_is_a_run_of_the_script(results):
    assert list(table_rows()) == [run.title for run in results.RUNS]
    for run in results.RUNS:
        assert run.config in packaged_configs()
        assert read_config(run.config)["model"]["class_path"] == run.name


def test_every_gain_is_significant():
    for title, (reward, gain, kl, *measured) in table_rows().items():
        before, after = map(float, reward.split(" -> "))
        low, high = map(float, gain.split(" to "))
        assert 0 < low <= after - before + 0.01, title
        assert after - before - 0.01 <= high, title
        assert 0 < float(kl) < 20, title
        assert len(measured) == 6
        assert all(float(number) > 0 for number in measured)


def test_the_page_has_the_command_that_made_it():
    command = (
        r"OMP_NUM_THREADS=1 python scripts/results.py( --config tests/real_data/stories.yaml)?"
    )
    assert re.search(rf"Made by `{command}` in one run", PAGE)
    assert re.search(r"torch [\d.]+", PAGE)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_algorithms_with_most_parts_gain_in_a_short_run(results, tmp_path):
    """RTO needs a DPO adapter and a critic; Hydra a model with a reward head and adapters."""
    if not (SHARED / "models" / "stories260K").is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("the reference data folder ../shared is not here")
    short = results.Results(tmp_path, num_batches=10, overlay="tests/real_data/stories.yaml")
    short.prepare()
    for run in results.RUNS:
        if run.folder in ("RTO", "HydraPPO", "HydraPPO_one_adapter"):
            row = short.row(run)
            assert row["gain, 95 % low"] > 0
            assert row["prompts"] == 276  # a twentieth of the prompts; equal ones stay together
            assert set(row["peaks"]) == set(results.PHASES)
            assert row["seconds"] > 0

"""Property tests of scores, groups, masks, reports and configs: no crash and no NaN."""

import json
import math

import pytest
import torch
from fake_run_folder import write_run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_align.cli.main import main
from lit_align.functional.masks import through_first, whiten
from lit_align.functional.returns import group_relative, leave_one_out
from lit_align.report.build import render_html, report_data
from lit_align.rewards.base import RewardError
from lit_align.rewards.execution import RowFailure, check_scores
from lit_align.runs.run_folder import RunFolder

ANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(max_size=40)
HUGE = "\u2028\x00\ufeff\x85film " * 2_000
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
SCORES = st.floats(-(2.0**40), 2.0**40, width=32)


@ANY
@given(groups=st.integers(2, 9).flatmap(
    lambda size: st.lists(st.lists(SCORES, min_size=size, max_size=size), min_size=1, max_size=4)
))  # fmt: skip
def test_groups_of_any_size_have_finite_advantages(groups):
    scores = torch.tensor(groups)
    for advantages in (
        group_relative(scores),
        group_relative(scores, False),
        leave_one_out(scores),
    ):
        assert advantages.isfinite().all()
        assert advantages.shape == scores.shape


@ANY
@given(
    rows=st.integers(1, 4),
    width=st.integers(0, 6),
    stops=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_masks_of_any_shape(rows, width, stops, seed):
    tokens = torch.randint(0, 6, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = through_first(tokens, stops)
    for ids, real in zip(tokens.tolist(), mask.tolist(), strict=True):
        first = next((i + 1 for i, token in enumerate(ids) if token in stops), width)
        assert real == [i < first for i in range(width)]
    assert whiten(tokens.double(), mask).isfinite().all()


ODD = VALUE | st.floats() | st.lists(VALUE, max_size=2) | st.builds(object)


@ANY
@given(scores=ODD | st.lists(ODD, max_size=5) | st.tuples(ODD, ODD), rows=st.integers(0, 5))
def test_any_return_value_of_a_reward_is_handled(scores, rows):
    try:
        outcomes = check_scores(scores, rows)
    except RewardError:  # any other error fails this test
        return
    assert len(outcomes) == rows
    for outcome in outcomes:
        fine = outcome is None or isinstance(outcome, RowFailure) or math.isfinite(outcome)
        assert fine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("any") / "run")


@ANY
@given(rows=st.lists(st.dictionaries(
    st.sampled_from(["prompt", "completion", "score", "length", "truncated"]) | TEXT, VALUE
)))  # fmt: skip
@example(rows=[{"prompt": "</script>", "completion": HUGE}, {}])
def test_a_report_accepts_any_responses(rows, folder):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "completions" / "rollout_00010.jsonl").write_text(lines)
    shown = report_data([RunFolder(folder)])
    page = render_html(shown)
    assert page.count("</script>") == 2
    data = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["answers"] == shown["answers"]
    assert len(shown["answers"]) == len(rows)


KEYS = st.sampled_from(["model", "data", "trainer", "rollout", "init_args", "class_path"]) | TEXT
CONFIG = st.recursive(
    VALUE, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3)
)


@ANY
@given(settings=CONFIG)
@example(settings={"model": {"class_path": "ReMax", "init_args": HUGE}})
@example(settings={"model": None, "data": []})
@example(settings={"model": True})
@example(settings={"model": {"class_path": 3}})
@example(settings={"data": {"init_args": [1]}})
@example(settings={"model": {"class_path": "", "init_args": {"": None}}})
@example(settings={"trainer": 0, "rollout": [], "reward": {"init_args": {}}})
def test_any_config_is_refused_with_one_sentence(settings, tmp_path, capsys):
    file = tmp_path / "any.yaml"
    file.write_text(json.dumps(settings))
    try:
        status = main(["fit", "--config", str(file), "--config", "toy"])
    except SystemExit as left:
        status = left.code
    assert status == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "lit-align:" in line]
    assert len(errors) == 1

"""`scripts/compare_predictions.py`: figures of two models on the same prompts."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare_predictions.py"))


def predictions(*scores: float, text: str = "a b a b") -> list[dict]:
    return [
        {"prompt": str(number), "completion": text, "score": score, "kl": 2.0 * score}
        for number, score in enumerate(scores)
    ]


def test_a_constant_gain_has_known_figures():
    figures = SCRIPT["summarize"](predictions(0, 1, 2), predictions(2, 3, 4, text="a a a"))
    assert figures == {
        "prompts": 3,
        "reward before": 1,
        "reward after": 3,
        "gain in standard deviations": 2,
        "gain, 95 % low": 2,
        "gain, 95 % high": 2,
        "KL after, nats per response": 6,
        "distinct-2 before": pytest.approx(2 / 9),  # a b, b a
        "distinct-2 after": pytest.approx(1 / 6),  # a a
    }


def test_the_interval_holds_the_mean_and_widens_with_the_spread():
    low, high = SCRIPT["bootstrap_interval"]([0.0, 1.0] * 50)
    assert 0.35 < low < 0.5 < high < 0.65


def test_predictions_for_other_prompts_are_refused():
    with pytest.raises(ValueError, match="have different prompts"):
        SCRIPT["summarize"](predictions(0, 1), predictions(0, 1)[::-1])


def test_the_table_is_printed(tmp_path, capsys):
    for name in ("before", "after"):
        lines = "".join(json.dumps(row) + "\n" for row in predictions(0, 1))
        (tmp_path / name).write_text(lines)
    assert SCRIPT["main"]([str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    assert "gain in standard deviations" in capsys.readouterr().out
    assert SCRIPT["main"]([]) == 2

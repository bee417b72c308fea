"""A command as the judge of pairs of responses."""

import sys

import pytest

from lit_align.evaluation.compare import compare_models
from lit_align.evaluation.judge import judge_pairs

LONGER = """import json, sys
for line in sys.stdin:
    row = json.loads(line)
    a, b = len(row["a"]), len(row["b"])
    print("a" if a > b else "b" if b > a else "tie")
"""


def judge(tmp_path, code: str) -> str:
    """Write a judge and return its command, with a space in the path."""
    (tmp_path / "my judge.py").write_text(code)
    return f"{sys.executable} '{tmp_path / 'my judge.py'}'"


def rows(*texts: object) -> list[dict]:
    return [
        {"prompt": "p\u2028", "completion": each, "length": 3, "kl": 0.0, "truncated": False}
        for each in texts
    ]


def test_each_pair_gets_a_verdict(tmp_path):
    mine, theirs = rows("abc", "a", "é\u2028\n"), rows("ab", "ab", "xyz")
    assert judge_pairs(judge(tmp_path, LONGER), mine, theirs) == [1.0, 0.0, 0.5]


def test_conversations_are_judged_by_their_text(tmp_path):
    mine = rows([{"role": "assistant", "content": "abc"}])
    assert judge_pairs(judge(tmp_path, LONGER), mine, rows("ab")) == [1.0]


def test_a_preference_for_one_position_cancels_out(tmp_path):
    code = "import sys\\nfor line in sys.stdin: print('a')".replace("\\n", "\n")
    assert judge_pairs(judge(tmp_path, code), rows("a", "b"), rows("c", "d")) == [0.5, 0.5]


def test_the_judge_has_its_own_win_rate_and_needs_no_reward(tmp_path):
    command = judge(tmp_path, LONGER)
    found = compare_models(
        {"one": rows("a", "a", "a", "a"), "other": rows("ab", "ab", "", "a")},
        1,
        lambda a, b: judge_pairs(command, a, b),
    )
    assert "reward" not in found["one"]
    assert "win rate" not in found["other"]
    assert found["other"]["judge's win rate"] == (1 + 1 + 0 + 0.5) / 4
    low, high = found["other"]["judge's win rate, 95 %"]
    assert low < found["other"]["judge's win rate"] < high
    assert found["other"]["judge's win rate at equal length"] == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('a')", "printed 1 lines for 2 pairs"),
        ("print('a\\nfirst')", "line 2 must be a, b or tie, found 'first'"),
        ("raise SystemExit('no key')", "ended with status 1: no key"),
        ("import sys; sys.exit(3)", "ended with status 3: it printed no error"),
    ],
)
def test_a_mistake_of_the_command_is_a_message(code, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        judge_pairs(judge(tmp_path, code), rows("a"), rows("b"))


@pytest.mark.parametrize("command", ["./nowhere.sh", "python 'half", ""])
def test_a_command_that_cannot_start_is_a_message(command):
    with pytest.raises(ValueError, match="could not be started"):
        judge_pairs(command, rows("a"), rows("b"))

"""Rewards without a model: scores by hand and refused settings."""

import pytest
import torch

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError
from lit_align.rewards.rules import (
    DigitSequence,
    ExactAnswer,
    Length,
    Lexicon,
    NumericAnswer,
    PrefixAnswer,
    RegexMatch,
)


def batch_of(completions: list, prompts: list | None = None, **columns: list) -> Experience:
    rows = len(completions)
    return Experience(
        {"prompt": prompts or ["p"] * rows, "completion": completions, **columns},
        responses=torch.zeros(rows, 3, dtype=torch.long),
        response_lengths=[1 + row for row in range(rows)],
    )


def test_exact_answer_ignores_white_space_around_and_between_words():
    batch = batch_of([" New  York\n", "New york", "Boston"], answer=["New York"] * 3)
    assert ExactAnswer()(batch) == [1.0, 0.0, 0.0]


def test_exact_answer_compares_the_last_match_in_both_texts():
    rule = ExactAnswer("truth", extract=r"<answer>(.*?)</answer>")
    completions = ["<answer>a</answer> no: <answer>b</answer>", "b", "<answer>a</answer>"]
    assert rule(batch_of(completions, truth=["<answer>b</answer>", "b", "b"])) == [1.0, 0.0, 0.0]


def test_exact_answer_reads_conversations_and_numbers():
    completions = [[{"role": "assistant", "content": text}] for text in ("7", "seven")]
    assert ExactAnswer()(batch_of(completions, answer=[7, 7])) == [1.0, 0.0]


def test_a_row_without_a_true_answer_is_not_scored():
    assert ExactAnswer()(batch_of(["a", "b"], answer=["a", None])) == [1.0, None]
    assert NumericAnswer()(batch_of(["1", "1"], answer=["none known", "1.0"])) == [None, 1.0]


def test_a_missing_column_is_named_with_the_existing_ones():
    with pytest.raises(RewardError, match=r"reads the column 'answer'.* only: prompt, completion"):
        NumericAnswer()(batch_of(["1"]))


@pytest.mark.parametrize(
    ("completion", "true"),
    [
        ("#### 42", "6 * 7 = <<6*7=42>>42\n#### 42"),
        ("so it is 42.", "#### 42"),
        ("#### 1,234.50 dollars, or 3", "1234.5"),
        ("It costs $80,000", "#### 80000"),
        ("-3", "#### -3.0"),
        ("minus: \u22123", "#### -3"),
        ("-$5", "$-5"),
        ("5-3", "3"),
        ("Answer: .5", "0.50"),
        ("7 ####", "7"),
        ("1,2,3", "3"),
        ("the answer:\n- 42", "42"),
    ],
)
def test_equal_numbers_score_1(completion: str, true: str):
    assert NumericAnswer()(batch_of([completion], answer=[true])) == [1.0]


@pytest.mark.parametrize(
    ("completion", "true"),
    [("43", "#### 42"), ("3", "-3"), ("#### 41, not 42", "42"), ("no idea", "42"), ("", "42")],
)
def test_other_numbers_score_0(completion: str, true: str):
    assert NumericAnswer()(batch_of([completion], answer=[true])) == [0.0]


def test_prefix_answer_counts_the_characters_before_the_first_mistake():
    completions = ["11,12", "11,13", "1", "12", "", "11,12,13"]
    scores = PrefixAnswer()(batch_of(completions, answer=["11,12"] * 6))
    assert scores == pytest.approx([5 / 6, 4 / 6, 1 / 6, 1 / 6, 0.0, 5 / 6])


def test_digit_sequence_computes_the_true_answer():
    rule = DigitSequence()
    assert rule.answer("9,10:20,2") == "11,12"
    assert rule.answer("8,3:9,4") == "7,2,6,1"  # the step is -5, 4 modulo 9
    assert rule.answer("5,8:9,0") == ""


def test_digit_sequence_is_scored_like_a_prefix_answer():
    prompts = ["9,10:20,2", [{"role": "user", "content": "8,3:9,4"}]]
    batch = batch_of(["11,13", [{"role": "assistant", "content": "7,2,1"}]], prompts)
    assert DigitSequence()(batch) == pytest.approx([4 / 6, 4 / 8])


def test_digit_sequence_refuses_other_prompts():
    with pytest.raises(UserError, match="prompts of the form a,b:M,N with M above 0, found '1,2:0"):
        DigitSequence()(batch_of(["1"], ["1,2:0,3"]))


def test_regex_match_scores_1_with_a_match():
    batch = batch_of(["<think>a</think> b", "b"])
    assert RegexMatch(r"^<think>.*</think>")(batch) == [1.0, 0.0]


def test_length_scores_0_at_its_target():
    assert Length(2)(batch_of(["a", "b", "c"])) == [-0.5, 0.0, -0.5]


def test_lexicon_sums_valences_like_vader(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("good\t1.0\t0.9\t[1]\nbad\t-1.0\n:)\t2.0\n\nfed up\t-1\n")
    completions = ["Good, good; really good!", "bad :)", "so so", "GOOD bad"]
    scores = Lexicon(str(path))(batch_of(completions))
    assert scores == pytest.approx([3 / 24**0.5, 1 / 16**0.5, 0.0, 0.0])


def test_invalid_settings_are_refused(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("good\t1.0\ngood 1.0\n")
    with pytest.raises(UserError, match=r"at least 1 token, found 0. Set --reward.func"):
        Length(0)
    with pytest.raises(UserError, match=r"pattern '\(' is not a regular expression: missing \)"):
        RegexMatch("(")
    with pytest.raises(UserError, match=r"bad.txt, line 2: expected `word<TAB>valence`, found 'g"):
        Lexicon(str(bad))
    with pytest.raises(UserError, match=r"nowhere.txt: no such lexicon file"):
        Lexicon("nowhere.txt")


def test_names_are_class_names_in_snake_case():
    class HTTPJudge(Length):
        pass

    assert [ExactAnswer().name, Length(1).name, HTTPJudge(1).name] == [
        "exact_answer",
        "length",
        "http_judge",
    ]

import pytest
import torch

from lit_align.batches import Experience
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


def answered(completions: list, prompts: list | None = None, **columns: list) -> Experience:
    rows = len(completions)
    return Experience(
        {"prompt": prompts or ["p"] * rows, "completion": completions, **columns},
        responses=torch.zeros(rows, 3, dtype=torch.long),
        response_lengths=[1 + row for row in range(rows)],
    )


def test_exact_answer_ignores_white_space_around_and_between_words():
    batch = answered([" New  York\n", "New york", "Boston"], answer=["New York"] * 3)
    assert ExactAnswer()(batch) == [1.0, 0.0, 0.0]


def test_exact_answer_takes_the_last_match_of_its_expression_in_both_texts():
    rule = ExactAnswer("truth", extract=r"<answer>(.*?)</answer>")
    said = ["<answer>a</answer> no: <answer>b</answer>", "b", "<answer>a</answer>"]
    assert rule(answered(said, truth=["<answer>b</answer>", "b", "b"])) == [1.0, 0.0, 0.0]


def test_exact_answer_reads_conversations_and_numbers():
    said = [[{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "seven"}]]
    assert ExactAnswer()(answered(said, answer=[7, 7])) == [1.0, 0.0]


def test_a_row_without_a_true_answer_is_not_scored():
    assert ExactAnswer()(answered(["a", "b"], answer=["a", None])) == [1.0, None]
    assert NumericAnswer()(answered(["1", "1"], answer=["none known", "1.0"])) == [None, 1.0]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(RewardError, match=r"reads the column 'answer'.* only: prompt, completion"):
        NumericAnswer()(answered(["1"]))


@pytest.mark.parametrize(
    ("said", "true"),
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
def test_equal_numbers(said: str, true: str):
    assert NumericAnswer()(answered([said], answer=[true])) == [1.0]


@pytest.mark.parametrize(
    ("said", "true"),
    [("43", "#### 42"), ("3", "-3"), ("#### 41, not 42", "42"), ("no idea", "42"), ("", "42")],
)
def test_other_numbers(said: str, true: str):
    assert NumericAnswer()(answered([said], answer=[true])) == [0.0]


def test_prefix_answer_counts_the_characters_before_the_first_mistake():
    said = ["11,12", "11,13", "1", "12", "", "11,12,13"]
    scores = PrefixAnswer()(answered(said, answer=["11,12"] * 6))
    assert scores == pytest.approx([5 / 6, 4 / 6, 1 / 6, 1 / 6, 0.0, 5 / 6])


def test_digit_sequence_works_out_the_answer():
    rule = DigitSequence()
    assert rule.answer("9,10:20,2") == "11,12"
    assert rule.answer("8,3:9,4") == "7,2,6,1"  # the step is -5, 4 modulo 9
    assert rule.answer("5,8:9,0") == ""


def test_digit_sequence_is_scored_like_a_prefix_answer():
    prompts = ["9,10:20,2", [{"role": "user", "content": "8,3:9,4"}]]
    batch = answered(["11,13", [{"role": "assistant", "content": "7,2,1"}]], prompts)
    assert DigitSequence()(batch) == pytest.approx([4 / 6, 4 / 8])


def test_digit_sequence_says_what_it_expects():
    with pytest.raises(ValueError, match="not of the form a,b:M,N"):
        DigitSequence()(answered(["1"], ["1,2:0,3"]))


def test_regex_match():
    batch = answered(["<think>a</think> b", "b"])
    assert RegexMatch(r"^<think>.*</think>")(batch) == [1.0, 0.0]


def test_length_is_best_at_its_target():
    assert Length(2)(answered(["a", "b", "c"])) == [-0.5, 0.0, -0.5]


def test_lexicon_sums_valences_as_vader_does(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("good\t1.0\t0.9\t[1]\nbad\t-1.0\n:)\t2.0\n\nfed up\t-1\n")
    said = ["Good, good; really good!", "bad :)", "so so", "GOOD bad"]
    scores = Lexicon(str(path))(answered(said))
    assert scores == pytest.approx([3 / 24**0.5, 1 / 16**0.5, 0.0, 0.0])


def test_bad_arguments_are_refused_in_one_sentence(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("good\t1.0\ngood 1.0\n")
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        Length(0)
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \)"):
        RegexMatch("(")
    with pytest.raises(ValueError, match=r"bad.txt, line 2: not `word<TAB>valence`"):
        Lexicon(str(bad))
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt: no such lexicon file"):
        Lexicon("nowhere.txt")


def test_names_are_the_classes_in_snake_case():
    class HTTPJudge(Length):
        pass

    assert [ExactAnswer().name, Length(1).name, HTTPJudge(1).name] == [
        "exact_answer",
        "length",
        "http_judge",
    ]

"""Figures by which answers are judged, by hand."""

import math

import pytest

from lit_align.evaluation.statistics import (
    distinct_n,
    length_controlled_win_rate,
    pairwise_wins,
    pass_at_k,
)


def test_distinct_counts_different_runs_of_words():
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # a b, b a
    assert distinct_n(["a", ""], 2) == 0.0


def test_a_tie_is_half_a_win():
    assert pairwise_wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == [0.0, 0.5, 1.0]


def test_pass_at_k_by_enumeration():
    # one of four answers is right: 3 of the 6 pairs hold it
    assert pass_at_k(2, [1], 4) == 0.5
    assert pass_at_k(1, [1, 3], 4) == 0.5
    assert pass_at_k(4, [1, 0], 4) == 0.5


def test_equal_lengths_leave_the_win_rate_as_it_is():
    rate, (low, high) = length_controlled_win_rate(
        [1.0] * 300 + [0.0] * 100, [5.0] * 400, [5.0] * 400
    )
    assert rate == pytest.approx(0.75, abs=1e-4)  # the ridge is 1e-2 against 400 answers
    assert 0.70 < low < 0.75 < high < 0.80


def test_wins_that_come_from_length_alone_are_worth_half():
    # of longer answers 3 in 4 win, of shorter ones 1 in 4: at equal length nothing is left
    won = [1.0, 1.0, 1.0, 0.0] * 50 + [1.0, 0.0, 0.0, 0.0] * 50
    lengths = [20.0] * 200 + [10.0] * 200
    rate, _ = length_controlled_win_rate(won, lengths, [15.0] * 400)
    assert rate == pytest.approx(0.5, abs=1e-9)


def test_the_logistic_regression_is_read_at_length_zero():
    # difference +d or 0 in equal numbers: sigma(a) is the win rate of the rows at 0
    won = [1.0] * 60 + [0.0] * 40 + [1.0] * 90 + [0.0] * 10
    lengths = [10.0] * 100 + [20.0] * 100
    rate, _ = length_controlled_win_rate(won, lengths, [10.0] * 200)
    assert rate == pytest.approx(0.6, abs=1e-3)


def test_where_every_answer_wins_the_rate_is_finite_and_near_one():
    rate, (low, high) = length_controlled_win_rate([1.0] * 50, [9.0, 11.0] * 25, [10.0] * 50)
    assert 0.99 < rate < 1.0
    assert all(math.isfinite(bound) for bound in (low, high))

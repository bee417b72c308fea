"""Statistics of responses, against numbers by hand."""

import math

import pytest

from lit_align.evaluation.statistics import (
    distinct_n,
    length_controlled_win_rate,
    pairwise_wins,
    pass_at_k,
)


def test_distinct_n_counts_distinct_ngrams():
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # a b, b a
    assert distinct_n(["a", ""], 2) == 0.0


def test_a_tie_is_half_a_win():
    assert pairwise_wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == [0.0, 0.5, 1.0]


def test_pass_at_k_by_enumeration():
    # one of four responses is correct: 3 of the 6 pairs contain it
    assert pass_at_k(2, [1], 4) == 0.5
    assert pass_at_k(1, [1, 3], 4) == 0.5
    assert pass_at_k(4, [1, 0], 4) == 0.5


def test_equal_lengths_do_not_change_the_win_rate():
    rate, (low, high) = length_controlled_win_rate(
        [1.0] * 300 + [0.0] * 100, [5.0] * 400, [5.0] * 400
    )
    assert rate == pytest.approx(0.75, abs=1e-4)  # the ridge is 1e-2 against 400 responses
    assert 0.70 < low < 0.75 < high < 0.80


def test_wins_by_length_alone_are_a_win_rate_of_one_half():
    # 3 in 4 of the longer responses win and 1 in 4 of the shorter ones: the length explains it all
    won = [1.0, 1.0, 1.0, 0.0] * 50 + [1.0, 0.0, 0.0, 0.0] * 50
    lengths = [20.0] * 200 + [10.0] * 200
    rate, _ = length_controlled_win_rate(won, lengths, [15.0] * 400)
    assert rate == pytest.approx(0.5, abs=1e-9)


def test_the_win_rate_is_the_prediction_at_equal_length():
    # half of the differences are 0: the prediction there is the win rate of these rows
    won = [1.0] * 60 + [0.0] * 40 + [1.0] * 90 + [0.0] * 10
    lengths = [10.0] * 100 + [20.0] * 100
    rate, _ = length_controlled_win_rate(won, lengths, [10.0] * 200)
    assert rate == pytest.approx(0.6, abs=1e-3)


def test_the_win_rate_is_finite_if_every_response_wins():
    rate, (low, high) = length_controlled_win_rate([1.0] * 50, [9.0, 11.0] * 25, [10.0] * 50)
    assert 0.99 < rate < 1.0
    assert all(math.isfinite(bound) for bound in (low, high))

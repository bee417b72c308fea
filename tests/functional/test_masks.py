"""Masks, and statistics over what they leave."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_align.functional.masks import masked_mean, through_first, whiten


def test_the_first_stop_is_the_last_real_token():
    tokens = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 1, 1, 1]])
    assert through_first(tokens, [2]).tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]


def test_any_of_several_stops_ends_a_row():
    tokens = torch.tensor([[5, 9, 2], [2, 9, 5]])
    assert through_first(tokens, (2, 9)).sum(-1).tolist() == [2, 1]
    assert through_first(tokens, []).all()


def test_a_padding_id_equal_to_the_stop_does_not_hide_the_stop():
    """papers/remax.md R10: the response 5, 6, stop, padding; the score is read at the stop."""
    assert through_first(torch.tensor([[5, 6, 2, 2]]), [2]).tolist() == [[True, True, True, False]]


def test_masks_agree_with_torchtune(golden):
    case = next(
        case for name, case in golden("torchtune_rewards").cases.items() if "truncate" in name
    )
    tokens = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 1, 1, 1]])
    assert torch.equal(through_first(tokens, [2]), ~case["padding_mask"])


def test_the_mean_is_over_real_tokens_of_the_whole_batch():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask) == 3


def test_the_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_whitened_numbers_by_hand():
    """Mean 3, unbiased variance (4 + 0 + 4) / 2 = 4."""
    x, mask = torch.tensor([[1.0, 9.0, 3.0], [5.0, 9.0, 9.0]]), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 0] = mask[0, 2] = mask[1, 0] = True
    assert whiten(x, mask).tolist() == [[-1, 0, 0], [1, 0, 0]]


def test_one_number_whitens_to_zero():
    assert whiten(torch.tensor([[7.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


def test_whitening_agrees_with_torchtune(close, golden):
    file = golden("torchtune_gae")
    expected = file.cases["whiten(adv,mask,shift_mean=False)"]
    close(whiten(file["adv"], file.mask), torch.where(file.mask, expected, 0))


def test_means_agree_with_openrlhf(close, golden):
    file = golden("openrlhf_misc")
    for row, expected in enumerate(file.cases["masked_mean,dim=-1"]):
        close(masked_mean(file["adv"][row], file.mask[row]), expected)


@pytest.mark.parametrize("function", [masked_mean, whiten])
@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_what_lies_outside_is_never_read(function, outside):
    mask = torch.tensor([[True, False, True], [False, True, False]])
    clean = torch.randn(2, 3, dtype=torch.double) * mask
    dirty = torch.where(mask, clean, outside).requires_grad_()
    assert torch.equal(function(dirty, mask), function(clean, mask))
    function(dirty, mask).square().sum().backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.floats(-5, 5))
def test_whitened_numbers_have_mean_0_and_do_not_notice_a_shift(values, shift):
    x = torch.tensor(values, dtype=torch.double)
    mask = torch.ones_like(x, dtype=torch.bool)
    whitened = whiten(x, mask)
    assert whitened.dtype == torch.double
    assert abs(whitened.mean()) < 1e-6
    assert whitened.var() < 1 + 1e-9
    torch.testing.assert_close(whiten(x + shift, mask), whitened, rtol=0, atol=1e-7)

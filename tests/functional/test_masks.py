"""Masks of real tokens, and statistics over the real tokens."""

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
    """The response is 5, 6, stop, padding: the score belongs to the stop at position 2."""
    assert through_first(torch.tensor([[5, 6, 2, 2]]), [2]).tolist() == [[True, True, True, False]]


def test_masks_agree_with_torchtune(golden):
    case = next(
        case for name, case in golden("torchtune_rewards").cases.items() if "truncate" in name
    )
    tokens = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 1, 1, 1]])
    assert torch.equal(through_first(tokens, [2]), ~case["padding_mask"])


def test_the_mean_is_over_all_real_tokens_of_the_batch():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask) == 3


def test_the_mean_over_an_empty_mask_is_0():
    assert masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_whitening_uses_the_unbiased_variance():
    """Mean 3, unbiased variance (4 + 0 + 4) / 2 = 4."""
    x, mask = torch.tensor([[1.0, 9.0, 3.0], [5.0, 9.0, 9.0]]), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 0] = mask[0, 2] = mask[1, 0] = True
    assert whiten(x, mask).tolist() == [[-1, 0, 0], [1, 0, 0]]


def test_one_number_is_whitened_to_0():
    assert whiten(torch.tensor([[7.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


def test_whitening_agrees_with_torchtune(assert_close, golden):
    file = golden("torchtune_gae")
    expected = file.cases["whiten(adv,mask,shift_mean=False)"]
    assert_close(whiten(file["adv"], file.mask), torch.where(file.mask, expected, 0))


def test_means_agree_with_openrlhf(assert_close, golden):
    file = golden("openrlhf_misc")
    for row, expected in enumerate(file.cases["masked_mean,dim=-1"]):
        assert_close(masked_mean(file["adv"][row], file.mask[row]), expected)


@pytest.mark.parametrize("function", [masked_mean, whiten])
@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_values_outside_the_mask_are_never_read(function, outside):
    mask = torch.tensor([[True, False, True], [False, True, False]])
    clean = torch.randn(2, 3, dtype=torch.double) * mask
    dirty = torch.where(mask, clean, outside).requires_grad_()
    assert torch.equal(function(dirty, mask), function(clean, mask))
    function(dirty, mask).square().sum().backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.floats(-5, 5))
def test_whitened_numbers_have_mean_0_and_ignore_a_shift(values, shift):
    x = torch.tensor(values, dtype=torch.double)
    mask = torch.ones_like(x, dtype=torch.bool)
    whitened = whiten(x, mask)
    assert whitened.dtype == torch.double
    assert abs(whitened.mean()) < 1e-6
    assert whitened.var() < 1 + 1e-9
    torch.testing.assert_close(whiten(x + shift, mask), whitened, rtol=0, atol=1e-7)

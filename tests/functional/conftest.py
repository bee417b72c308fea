"""Fixtures of the tests of functions: golden files, a fixed seed, and a comparison."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_files import Golden
from torch import Tensor


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """The class that reads a golden file by name."""
    return Golden


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """A check of equal shapes and of values up to a tolerance, relative and absolute."""

    def check(actual: Tensor, expected: Any, tolerance: float = 2e-6) -> None:
        expected = torch.as_tensor(expected, dtype=actual.dtype)
        torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)

    return check

"""The golden files of this repository are picked from the full ones."""

import json

import pytest
import torch
from golden_files import FULL, PICKED, Golden

NAMES = sorted(path.stem for path in PICKED.glob("*.json"))


def assert_picked_from(picked, full):
    """Tensors are equal, or the first steps of the full one; every dict key is in the full one."""
    if isinstance(picked, dict):
        for name, part in picked.items():
            assert_picked_from(part, full[name])
    elif picked.shape == full.shape:
        assert torch.equal(picked, full)
    else:
        assert torch.equal(picked, full[: len(picked)])


@pytest.mark.skipif(not FULL.is_dir(), reason="the full golden files are not there")
@pytest.mark.parametrize("name", NAMES)
def test_picked_cases_equal_the_full_ones(name):
    picked, full = (
        Golden(json.loads((folder / f"{name}.json").read_text())) for folder in (PICKED, FULL)
    )
    assert picked.cases
    assert_picked_from(picked.inputs, full.inputs)
    assert_picked_from(picked.cases, full.cases)


def test_the_picked_files_are_small():
    assert len(NAMES) == 16
    assert sum((PICKED / f"{name}.json").stat().st_size for name in NAMES) < 110_000

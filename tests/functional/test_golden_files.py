"""The golden files of this repository are picked from the full ones."""

import json

import numpy as np
import pytest
from golden_files import FULL, PICKED

NAMES = sorted(path.stem for path in PICKED.glob("*.json"))


def assert_picked_from(picked, full):
    """The same float32 numbers; dicts may have fewer keys and lists fewer entries at the end."""
    if isinstance(picked, dict):
        for name, part in picked.items():
            assert_picked_from(part, full[name])
    elif isinstance(picked, list):
        assert len(picked) <= len(full)
        for part, other in zip(picked, full, strict=False):
            assert_picked_from(part, other)
    else:
        assert np.float32(picked) == np.float32(full)


@pytest.mark.skipif(not FULL.is_dir(), reason="the full golden files are not there")
@pytest.mark.parametrize("name", NAMES)
def test_picked_cases_equal_the_full_ones(name):
    picked, full = (json.loads((folder / f"{name}.json").read_text()) for folder in (PICKED, FULL))
    assert picked["cases"]
    assert_picked_from(picked, full)


def test_the_picked_files_are_small():
    assert len(NAMES) == 16
    assert sum((PICKED / f"{name}.json").stat().st_size for name in NAMES) < 110_000

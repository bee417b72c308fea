"""Golden files: outputs of other libraries on stored inputs.

The full files are read where the reference folder exists (CONTRIBUTING.md, "Tests that a clone
skips"), else the cases picked in `tests/golden`. A test of a case that is not picked is skipped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHARED
from torch import Tensor

FULL, PICKED = SHARED / "golden", Path(__file__).parent / "golden"


class Cases(dict[str, Any]):
    """Cases by name; reading one that was not picked skips the test."""

    def __missing__(self, case: str) -> Any:
        if FULL.is_dir():
            raise KeyError(case)
        pytest.skip(f"the case {case!r} is in the full golden files only")


class Golden:
    """One file: its inputs and cases, with every list of numbers as a tensor."""

    def __init__(self, name: str):
        content = read_golden_json(name)
        self.inputs = {key: torch.tensor(value) for key, value in content["inputs"].items()}
        self.cases = Cases({case: tensors(value) for case, value in content["cases"].items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    @property
    def mask(self) -> Tensor:
        """[N, R] bool."""
        return self.inputs["mask"].bool()


def tensors(value: Any) -> Any:
    """Return nested dicts with each list of numbers as a tensor."""
    if isinstance(value, dict):
        return {name: tensors(part) for name, part in value.items()}
    return torch.tensor(value)


def read_golden_json(name: str) -> dict[str, Any]:
    """Return the inputs and cases of the full file of that name, or of the picked one."""
    folder = FULL if FULL.is_dir() else PICKED
    content = json.loads((folder / f"{name}.json").read_text())
    return {"inputs": content["inputs"], "cases": Cases(content["cases"])}

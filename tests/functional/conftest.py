"""Numbers computed once with other people's code, kept beside the project."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = pathlib.Path(__file__).parents[3] / "shared" / "golden"


class Golden:
    """One file: its inputs and cases, with every list of numbers as a tensor."""

    def __init__(self, content: dict[str, Any]):
        self.inputs = {name: torch.tensor(value) for name, value in content["inputs"].items()}
        self.cases = {name: tensors(value) for name, value in content["cases"].items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    @property
    def mask(self) -> Tensor:
        return self.inputs["mask"].bool()


def tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: tensors(part) for name, part in value.items()}
    return torch.tensor(value)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    if not FOLDER.is_dir():
        pytest.skip("the golden files do not lie beside the project")
    return lambda name: Golden(json.loads((FOLDER / f"{name}.json").read_text()))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def close() -> Callable[..., None]:
    """Equal in shape and, up to 2e-6 relative and absolute, in value."""

    def check(actual: Tensor, expected: Any, tolerance: float = 2e-6) -> None:
        expected = torch.as_tensor(expected, dtype=actual.dtype)
        torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)

    return check

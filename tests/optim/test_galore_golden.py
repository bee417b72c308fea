"""The projections of the released code, recorded: 8 gradients, rank 3, gap 4, scale 0.25."""

import json

import pytest
import torch
from tiny_models import SHARED
from torch import Tensor, nn

from lit_align.optim.galore import GaLoreAdamW, leading_singular_vectors, project, project_back

RECORD = SHARED / "golden" / "galore_projector.json"
pytestmark = pytest.mark.skipif(not RECORD.is_file(), reason=f"{RECORD} is not there")
SHAPES = ("12x6", "6x12", "8x8")
SIDES = ("std", "reverse_std", "right", "left")


def golden(shape: str, side: str) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """([8, out, in] gradients, what was recorded of each: the basis of two of them)."""
    record = json.loads(RECORD.read_text())
    case = record["cases"][f"{shape},{side}"]
    gradients = torch.tensor(record["inputs"][f"grads_{shape}"])
    bases = case.pop("basis_at_steps_0_and_4")
    if side != "full":
        case["basis"] = bases
    return gradients, {name: [*map(torch.tensor, values)] for name, values in case.items()}


def is_right(shape: str, side: str) -> bool:
    tall = shape != "6x12"
    return {"std": tall, "reverse_std": not tall}.get(side, side == "right")


def close(mine: Tensor, recorded: Tensor) -> None:
    """Equal to 2e-6 of the recorded tensor's norm."""
    assert mine.shape == recorded.shape
    assert float((mine - recorded).norm() / recorded.norm()) < 2e-6


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_are_the_released_ones(shape, side):
    gradients, recorded = golden(shape, side)
    right = is_right(shape, side)
    for number, gradient in enumerate(gradients):
        if number % 4 == 0:
            basis = leading_singular_vectors(gradient, 3, right)
            theirs = recorded["basis"][number // 4]
            theirs = theirs.mT if right else theirs
            signs = (basis * theirs).sum(0).sign()
            close(basis * signs, theirs)
        low = project(gradient, basis, right)
        flips = signs if right else signs[:, None]
        close(low * flips, recorded["low_rank"][number])
        close(project_back(low, basis, right) * 0.25, recorded["projected_back"][number])


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_on_both_sides_are_the_released_ones(shape):
    gradients, recorded = golden(shape, "full")
    for number, gradient in enumerate(gradients):
        if number % 4 == 0:
            left, right = (
                leading_singular_vectors(gradient, 3, False),
                leading_singular_vectors(gradient, 3, True),
            )
        low = project(project(gradient, left, False), right, True)
        assert low.shape == recorded["low_rank"][number].shape
        back = project_back(project_back(low, right, True), left, False) * 0.25
        close(back, recorded["projected_back"][number])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizer_projects_on_the_standard_side_and_schedule(shape):
    """With betas 0 and a large eps Adam's direction is the projected gradient over eps."""
    gradients, recorded = golden(shape, "std")
    param = nn.Parameter(torch.zeros_like(gradients[0]))
    group = {"params": [param], "rank": 3, "update_gap": 4, "scale": 0.25}
    optimizer = GaLoreAdamW([group], lr=1e8, betas=(0.0, 0.0), eps=1e8)
    for gradient, change in zip(gradients, recorded["projected_back"], strict=True):
        param.data.zero_()
        param.grad = gradient.clone()
        optimizer.step()
        close(-param.data, change)

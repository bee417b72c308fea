"""Projections agree with the released code: rank 3, gap 4, scale 0.25 (see tests/golden)."""

import pytest
import torch
from golden_files import read_golden_json
from torch import Tensor, nn

from lit_align.optim.galore import GaLoreAdamW, leading_singular_vectors, project, project_back

SHAPES = ("12x6", "6x12", "8x8")
SIDES = ("std", "reverse_std", "right", "left")


def golden(shape: str, side: str) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Return gradients [steps, out, in] and the stored outputs of each step."""
    content = read_golden_json("galore_projector")
    case = content["cases"][f"{shape},{side}"]
    gradients = torch.tensor(content["inputs"][f"grads_{shape}"])
    bases = case.pop("basis_at_steps_0_and_4")
    if side != "full":
        case["basis"] = bases
    return gradients, {name: [*map(torch.tensor, values)] for name, values in case.items()}


def is_right(shape: str, side: str) -> bool:
    """Return True if the released code projects this shape from the right."""
    tall = shape != "6x12"
    return {"std": tall, "reverse_std": not tall}.get(side, side == "right")


def assert_close(actual: Tensor, stored: Tensor) -> None:
    """Equal up to 2e-6 of the norm of the stored tensor."""
    assert actual.shape == stored.shape
    assert float((actual - stored).norm() / stored.norm()) < 2e-6


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_agree_with_the_released_code(shape, side):
    gradients, stored = golden(shape, side)
    right = is_right(shape, side)
    for number, gradient in enumerate(gradients):
        if number % 4 == 0:
            basis = leading_singular_vectors(gradient, 3, right)
            released = stored["basis"][number // 4]
            released = released.mT if right else released
            # singular vectors are unique up to their sign
            signs = (basis * released).sum(0).sign()
            assert_close(basis * signs, released)
        low = project(gradient, basis, right)
        flips = signs if right else signs[:, None]
        assert_close(low * flips, stored["low_rank"][number])
        assert_close(project_back(low, basis, right) * 0.25, stored["projected_back"][number])


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_on_both_sides_agree_with_the_released_code(shape):
    gradients, stored = golden(shape, "full")
    for number, gradient in enumerate(gradients):
        if number % 4 == 0:
            left, right = (
                leading_singular_vectors(gradient, 3, False),
                leading_singular_vectors(gradient, 3, True),
            )
        low = project(project(gradient, left, False), right, True)
        assert low.shape == stored["low_rank"][number].shape
        back = project_back(project_back(low, right, True), left, False) * 0.25
        assert_close(back, stored["projected_back"][number])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizer_uses_the_standard_side_and_schedule(shape):
    """With betas 0 and a large eps, the direction is the projected gradient over eps."""
    gradients, stored = golden(shape, "std")
    param = nn.Parameter(torch.zeros_like(gradients[0]))
    group = {"params": [param], "rank": 3, "update_gap": 4, "scale": 0.25}
    optimizer = GaLoreAdamW([group], lr=1e8, betas=(0.0, 0.0), eps=1e8)
    for gradient, change in zip(gradients, stored["projected_back"], strict=True):
        param.data.zero_()
        param.grad = gradient.clone()
        optimizer.step()
        assert_close(-param.data, change)

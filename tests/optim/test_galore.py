"""GaLoreAdamW: the update rule of arXiv:2403.03507 in numbers that can be checked by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW

from lit_align.optim.galore import (
    GaLoreAdamW,
    leading_singular_vectors,
    num_state_values,
    project,
    project_back,
)

TALL = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
EXACT = {"rtol": 0, "atol": 1e-6}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def step(optimizer: GaLoreAdamW, param: nn.Parameter, gradient: Tensor) -> None:
    param.grad = gradient.clone()
    optimizer.step()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def galore(param: nn.Parameter, lr: float = 0.1, **group: float) -> GaLoreAdamW:
    return GaLoreAdamW([{"params": [param], "rank": 1, **group}], lr=lr)


# The subspace -----------------------------------------------------------------------------------


def test_a_tall_gradient_is_projected_from_the_right():
    basis = leading_singular_vectors(TALL, 1, right=True)
    torch.testing.assert_close(basis, torch.tensor([[0.0], [1.0]]), **EXACT)
    low = project(TALL, basis, right=True)
    torch.testing.assert_close(low, torch.tensor([[0.0], [4.0], [0.0]]), **EXACT)
    back = project_back(low, basis, right=True) * 0.25
    torch.testing.assert_close(back, torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), **EXACT)


def test_a_wide_gradient_is_projected_from_the_left():
    basis = leading_singular_vectors(TALL.mT, 1, right=False)
    low = project(TALL.mT, basis, right=False)
    torch.testing.assert_close(low, torch.tensor([[0.0, 4.0, 0.0]]), **EXACT)
    back = project_back(low, basis, right=False) * 0.25
    torch.testing.assert_close(back, torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), **EXACT)


@pytest.mark.parametrize(("shape", "low"), [((3, 2), (3, 1)), ((2, 3), (1, 3)), ((4, 4), (4, 1))])
def test_the_moments_are_as_long_as_the_larger_side(shape, low):
    param = weight(*shape)
    optimizer = galore(param)
    step(optimizer, param, random(*shape, dtype=torch.float32))
    state = optimizer.state[param]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low
    assert state["projector"].shape == (min(shape), 1)


def test_projection_on_the_other_side_has_shorter_moments():
    assert project(TALL.mT, leading_singular_vectors(TALL.mT, 1, right=True), right=True).shape == (
        2,
        1,
    )


@pytest.mark.parametrize("right", [True, False])
def test_the_basis_holds_singular_vectors_largest_first(right):
    gradient = random(7, 5)
    left, sizes, others = torch.linalg.svd(gradient, full_matrices=False)
    basis = leading_singular_vectors(gradient, 3, right)
    expected = others[:3].mT if right else left[:, :3]
    torch.testing.assert_close((basis * expected).sum(0).abs(), torch.ones(3).double())
    torch.testing.assert_close(
        project(gradient, basis, right).norm(dim=0 if right else 1), sizes[:3]
    )


@pytest.mark.parametrize("right", [True, False])
def test_the_largest_entry_of_each_vector_is_positive(right):
    for seed in range(5):
        basis = leading_singular_vectors(random(7, 5, seed=seed), 3, right)
        leading = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        assert (leading > 0).all()
        assert torch.equal(basis, leading_singular_vectors(-random(7, 5, seed=seed), 3, right))


def test_the_sign_of_equal_entries_does_not_depend_on_rounding():
    rounded = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    for change in (-1e-9, 0.0, 1e-9):
        rounded[0, 1] = -1.0 + change
        basis = leading_singular_vectors(rounded, 1, right=True)
        assert basis[0, 0] > 0 > basis[1, 0]


def test_half_precision_gradients_have_the_singular_vectors_of_float32():
    gradient = random(9, 6, dtype=torch.bfloat16)
    basis = leading_singular_vectors(gradient, 2, right=True)
    assert basis.dtype == torch.bfloat16
    assert torch.equal(basis, leading_singular_vectors(gradient.float(), 2, right=True).bfloat16())


# Steps ------------------------------------------------------------------------------------------


def test_the_first_step_moves_the_leading_entry_by_lr_times_scale():
    param = weight(3, 2)
    optimizer = galore(param, scale=0.25)
    step(optimizer, param, TALL)
    expected = torch.zeros(3, 2)
    expected[1, 1] = -0.0249998
    torch.testing.assert_close(param.data, expected, rtol=0, atol=1e-7)
    state = optimizer.state[param]
    torch.testing.assert_close(state["exp_avg"], torch.tensor([[0.0], [0.4], [0.0]]), **EXACT)
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([[0.0], [0.016], [0.0]]), **EXACT)


def weights_over_a_switch(carried: bool) -> list[Tensor]:
    """Return the weights after steps 1, 2 and 3; the third step is in another subspace."""
    param = weight(2, 2)
    optimizer = galore(param, update_gap=2, scale=1.0)
    weights = []
    for number, sizes in enumerate(([4.0, 3.0], [3.0, 4.0], [3.0, 4.0])):
        if number == 2 and not carried:
            optimizer.state[param]["exp_avg"].zero_()
            optimizer.state[param]["exp_avg_sq"].zero_()
        step(optimizer, param, torch.tensor(sizes).diag())
        weights.append(param.data.clone())
    assert int(optimizer.state[param]["step"]) == 3
    return weights


def test_moments_are_carried_into_the_next_subspace():
    weights = weights_over_a_switch(carried=True)
    assert float(weights[0][0, 0]) == pytest.approx(-0.099999, abs=1e-6)
    assert float(weights[1][0, 0]) == pytest.approx(-0.198256, abs=1e-6)
    expected = torch.tensor([[-0.198256, -0.075953], [0.0, -0.063881]])
    torch.testing.assert_close(weights[2], expected, **EXACT)


def test_moments_reset_to_0_would_move_only_the_new_vector():
    weights = weights_over_a_switch(carried=False)
    assert float(weights[2][0, 1]) == 0.0
    torch.testing.assert_close(weights[2][0], weights[1][0])


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_the_subspace_changes_at_steps_0_gap_and_2_gap(gap):
    param = nn.Parameter(random(5, 4))
    optimizer = galore(param, update_gap=gap)
    bases = []
    for number in range(6):
        step(optimizer, param, random(5, 4, seed=number))
        bases.append(optimizer.state[param]["projector"])
    for number, basis in enumerate(bases):
        since = random(5, 4, seed=number // gap * gap)
        assert torch.equal(basis, leading_singular_vectors(since, 1, right=True))


def test_the_update_is_linear_in_the_scale():
    changes = []
    for scale in (0.25, 1.0):
        param = weight(3, 2)
        step(galore(param, scale=scale), param, TALL)
        changes.append(param.data)
    torch.testing.assert_close(changes[0] * 4, changes[1])


def test_the_defaults_are_from_the_paper():
    group = galore(weight(3, 2)).param_groups[0]
    assert (group["update_gap"], group["scale"]) == (200, 0.25)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-6, 0.0)


def test_several_steps_follow_the_formula():
    """W -= lr a sqrt(1 - b2^t) / (1 - b1^t) N P^T, then W -= lr wd W; two periods."""
    param, start = nn.Parameter(random(6, 4)), random(6, 4)
    group = {"params": [param], "rank": 2, "update_gap": 2, "scale": 0.5}
    optimizer = GaLoreAdamW([group], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    mean, square, expected = torch.zeros(6, 2).double(), torch.zeros(6, 2).double(), start.clone()
    for number in range(4):
        gradient = random(6, 4, seed=10 + number)
        step(optimizer, param, gradient)
        if number % 2 == 0:
            vectors = torch.linalg.svd(gradient)[2][:2].mT
            signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
            basis = vectors * signs
        low, t = gradient @ basis, number + 1
        mean, square = 0.8 * mean + 0.2 * low, 0.9 * square + 0.1 * low**2
        rate = 0.1 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t)
        expected = expected - rate * 0.5 * (mean / (square.sqrt() + 1e-3)) @ basis.mT
        expected = expected - 0.1 * 0.3 * expected
    torch.testing.assert_close(param.data, expected, rtol=1e-10, atol=1e-12)


def test_within_a_period_the_sign_of_a_vector_does_not_matter():
    def train(sign: float) -> Tensor:
        param = nn.Parameter(random(5, 4))
        optimizer = galore(param)
        step(optimizer, param, random(5, 4))
        state = optimizer.state[param]
        state["projector"] = state["projector"] * sign
        state["exp_avg"] = state["exp_avg"] * sign
        for number in range(3):
            step(optimizer, param, random(5, 4, seed=number))
        return param.data

    assert torch.equal(train(1.0), train(-1.0))


def test_within_a_period_the_rotation_of_the_basis_matters():
    def train(turn: Tensor) -> Tensor:
        param = nn.Parameter(random(5, 4))
        optimizer = GaLoreAdamW([{"params": [param], "rank": 2}], lr=0.1)
        step(optimizer, param, random(5, 4))
        state = optimizer.state[param]
        state["projector"] = state["projector"] @ turn
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        step(optimizer, param, random(5, 4, seed=1))
        return param.data

    half = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    assert (train(torch.eye(2).double()) - train(half)).norm() > 1e-3


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_projection_of_full_rank_loses_nothing(shape):
    gradient, right = random(*shape), shape[0] >= shape[1]
    basis = leading_singular_vectors(gradient, 5, right)
    one, other = nn.Parameter(random(*shape, seed=2)), nn.Parameter(random(*shape, seed=2))
    optimizers = SGD([one], lr=0.1), SGD([other], lr=0.1)
    for number in range(3):
        one.grad = random(*shape, seed=number)
        other.grad = project_back(project(one.grad, basis, right), basis, right)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_projection_of_a_mean_is_the_mean_of_the_projections():
    parts = [random(5, 4, seed=number) for number in range(4)]
    basis = leading_singular_vectors(parts[0], 2, right=True)
    mean = torch.stack([project(part, basis, right=True) for part in parts]).mean(0)
    torch.testing.assert_close(project(torch.stack(parts).mean(0), basis, right=True), mean)


def test_the_gradient_is_clipped_before_it_is_projected():
    param = weight(3, 2)
    optimizer = galore(param)
    param.grad = TALL.clone()
    assert float(nn.utils.clip_grad_norm_([param], 1.0)) == 5.0
    optimizer.step()
    assert float(optimizer.state[param]["exp_avg"].norm()) == pytest.approx(0.1 * 4 / 5)


def test_an_accumulated_gradient_makes_one_step():
    param = nn.Parameter(torch.zeros(()))
    optimizer = GaLoreAdamW([param], lr=0.1, eps=1e-8)
    for part in (4.0, -2.0, 1.0, 1.0):
        (param * part / 4).backward()
    optimizer.step()
    assert float(param.detach()) == pytest.approx(-0.1, abs=1e-6)


def test_a_step_per_micro_batch_would_give_another_weight():
    param = nn.Parameter(torch.zeros(()))
    optimizer = GaLoreAdamW([param], lr=0.1, eps=1e-8)
    for part in (4.0, -2.0, 1.0, 1.0):
        step(optimizer, param, torch.tensor(part / 4))
    assert float(param.detach()) == pytest.approx(-0.2003254, abs=1e-6)


def test_steps_need_no_values():
    """Shapes are enough, so nothing waits for a device."""
    with FakeTensorMode():
        param = weight(6, 4)
        optimizer = galore(param, update_gap=2)
        for _ in range(4):
            step(optimizer, param, torch.ones(6, 4))
        state = optimizer.state[param]
        assert int(state["step"]) == 4
        assert state["projector"].shape == (4, 1)


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_nan_or_infinite_gradient_makes_weights_nan(strange):
    param, gradient = weight(6, 4), random(6, 4, dtype=torch.float32)
    gradient[2, 1] = strange
    step(galore(param), param, gradient)
    assert param[2].isnan().any()  # as with AdamW, so that a NaN guard can see it


# What is not projected --------------------------------------------------------------------------


def plain_step(weight_decay: float = 0.0) -> Tensor:
    """Return a vector of 1 after a step with gradient 1e-4."""
    param = nn.Parameter(torch.ones(1).double())
    optimizer = GaLoreAdamW([param], lr=0.1, weight_decay=weight_decay)
    step(optimizer, param, torch.full((1,), 1e-4, dtype=torch.float64))
    return param.data


def test_eps_is_added_before_the_bias_correction():
    """M = 1e-5, V = 1e-11: sqrt(V) = 3.1623e-6 against eps = 1e-6."""
    root = math.sqrt(1e-11)
    expected = 1 - 0.1 * math.sqrt(0.001) / 0.1 * 1e-5 / (root + 1e-6)
    assert float(plain_step()) == pytest.approx(expected, abs=1e-12)
    param = nn.Parameter(torch.ones(1).double())
    param.grad = torch.full((1,), 1e-4, dtype=torch.float64)
    AdamW([param], lr=0.1, eps=1e-6, weight_decay=0.0).step()
    assert float(param.detach()) == pytest.approx(1 - 0.1 * 1e-4 / (1e-4 + 1e-6), abs=1e-12)


def test_the_decay_comes_after_the_update():
    assert float(plain_step(0.5)) == pytest.approx(float(plain_step()) * (1 - 0.1 * 0.5), abs=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4), ()])
def test_only_matrices_are_projected(shape):
    one, other = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
    optimizers = galore(one), GaLoreAdamW([other], lr=0.1)
    for number in range(3):
        for optimizer, param in zip(optimizers, (one, other), strict=True):
            step(optimizer, param, random(*shape, seed=number))
    assert torch.equal(one, other)
    assert "projector" not in optimizers[0].state[one]


@pytest.mark.parametrize(("rank", "projected"), [(42, True), (43, False), (64, False), (99, False)])
def test_a_matrix_is_projected_if_that_saves_memory(rank, projected):
    """64 x 64: 3 * 64 r < 2 * 64 * 64 up to r = 42."""
    param = weight(64, 64)
    optimizer = GaLoreAdamW([{"params": [param], "rank": rank}], lr=0.1)
    step(optimizer, param, random(64, 64, dtype=torch.float32))
    assert ("projector" in optimizer.state[param]) == projected


def test_a_group_without_rank_is_not_projected():
    one, other = weight(3, 2), weight(3, 2)
    optimizer = GaLoreAdamW([{"params": [one], "rank": 1}, {"params": [other]}], lr=0.1)
    one.grad, other.grad = TALL.clone(), TALL.clone()
    optimizer.step()
    assert set(optimizer.state[one]) == {"step", "projector", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[other]) == {"step", "exp_avg", "exp_avg_sq"}
    expected = torch.tensor([[-0.0999989, 0.0], [0.0, -0.0999992], [0.0, 0.0]])
    torch.testing.assert_close(other.data, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 1, "update_gap": 0}])
def test_rank_and_update_gap_must_be_at_least_1(wrong):
    with pytest.raises(ValueError, match=r"must be at least 1, found 0\. Set (rank|update_gap) to"):
        GaLoreAdamW([{"params": [weight(3, 2)], **wrong}], lr=0.1)


# Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((4096, 11008), 1024, 26_738_688),
        ((11008, 4096), 1024, 26_738_688),
        ((1024, 4096), 1024, 2 * 1024 * 4096),  # the projection would take 9,437,184
    ],
)
def test_the_number_of_state_values_of_a_matrix(shape, rank, expected):
    assert num_state_values(*shape, rank) == expected


def num_kept_values(optimizer: GaLoreAdamW) -> int:
    """Return how many numbers the projectors and moments of the state have."""
    states = optimizer.state.values()
    return sum(v.numel() for state in states for key, v in state.items() if key != "step")


LLAMA = [(64, 64)] * 4 + [(176, 64)] * 2 + [(64, 176)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_has_the_bytes_of_the_formula(dtype):
    """Llama of hidden size 64, MLP 176, 2 layers, rank 16: 64,512 numbers instead of 200,704."""
    matrices = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in LLAMA * 2]
    norms = [nn.Parameter(torch.zeros(64, dtype=dtype)) for _ in range(5)]
    optimizer = GaLoreAdamW([{"params": [*matrices, *norms], "rank": 16}], lr=0.1)
    for param in (*matrices, *norms):
        param.grad = random(*param.shape, dtype=dtype)
    optimizer.step()
    assert num_kept_values(optimizer) == 64_512 + 2 * 5 * 64
    size = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert size == num_kept_values(optimizer) * dtype.itemsize
    assert 2 * sum(param.numel() for param in matrices) == 200_704


def state_of(model: list[tuple[int, ...]], rank: int) -> int:
    """Return how many numbers a step adds for the shapes of a model, on the meta device."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in model]
    optimizer = GaLoreAdamW([{"params": params, "rank": rank}], lr=0.1)
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    return num_kept_values(optimizer)


def test_the_state_of_llama_7b_is_as_in_the_paper():
    """In bfloat16 at rank 1024, 25.10 GiB of AdamW become 8.76 GiB, 65.1 % less."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    outside = [(32000 * 4096,)] * 2 + [(4096,)] * 65  # embedding and head are not projected
    adam, lean = (2 * state_of(block * 32 + outside, rank) / 2**30 for rank in (4096, 1024))
    assert adam == pytest.approx(25.10, abs=5e-3)
    assert lean == pytest.approx(8.76, abs=5e-3)
    assert 1 - lean / adam == pytest.approx(0.651, abs=5e-4)


def llama(hidden: int, narrow: int, middle: int, layers: int) -> tuple[list[tuple[int, int]], int]:
    """Return the matrices of the blocks and the numbers outside of them, without norms."""
    block = [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2
    block += [(middle, hidden)] * 2 + [(hidden, middle)]
    return block * layers, 2 * 32000 * hidden


@pytest.mark.parametrize(
    ("model", "rank", "billions", "table"),
    [
        (llama(2048, 2048, 5461, 24), 512, 1.339, (16.1, 9.2, 6.6)),
        (llama(4096, 4096, 11008, 32), 1024, 6.738, (80.9, 43.9, 32.7)),
        (llama(8192, 1024, 28672, 80), 2048, 68.98, (827.7, 438.5, 327.2)),
    ],
    ids=["1B", "7B", "70B"],
)
def test_the_bytes_are_as_in_the_table_of_the_paper(model, rank, billions, table):
    """GB of 12 N; of 4 N + 2 P + 4 S + 8 o; and, in 8 bits, of 4 N + 2 P + 1.016 (S + 2 o)."""
    matrices, outside = model
    number = outside + sum(rows * columns for rows, columns in matrices)
    assert number == pytest.approx(billions * 1e9, rel=5e-4)
    projector = moments = plain = 0
    for rows, columns in matrices:
        values = num_state_values(rows, columns, rank)
        if values < 2 * rows * columns:
            projector += rank * min(rows, columns)
            moments += values - rank * min(rows, columns)
        else:
            plain += rows * columns
    plain += outside
    float32 = 4 * number + 2 * projector + 4 * moments + 8 * plain
    eight = 4 * number + 2 * projector + 1.016 * (moments + 2 * plain)
    found = [size / 1e9 for size in (12 * number, float32, eight)]
    assert found == pytest.approx(list(table), abs=0.0501)

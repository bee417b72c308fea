"""W = scale B A + S: values, gradients, and the memory saved for backward."""

from itertools import combinations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.functional.sparse_low_rank import dense_weight, draw_support, sparse_low_rank

# B = [[1], [2]], A = [[3, 4]], scale 2, S = .5 at row 0, column 1 and -1 at row 1, column 0
A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
VALUE, INDEX, SCALE = torch.tensor([0.5, -1.0]), torch.tensor([1, 2], dtype=torch.int32), 2.0


def random_parts(inputs=3, outputs=5, rank=2, number=4, dtype=torch.float64):
    """Return the trained parts of a weight [outputs, inputs], and the positions of its entries."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    index = draw_support(torch.empty(number), outputs * inputs, 0)
    return draw(rank, inputs), draw(outputs, rank), draw(number), index


def definition(inputs, lora_a, lora_b, value, index, scale):
    """Return the product by its definition."""
    sparse = torch.zeros(lora_b.shape[0] * lora_a.shape[1], dtype=value.dtype)
    sparse = sparse.index_put((index.long(),), value).view(lora_b.shape[0], lora_a.shape[1])
    return inputs @ (scale * lora_b @ lora_a + sparse).T


def test_the_weight_is_scaled_low_rank_plus_sparse():
    assert dense_weight(A, B, VALUE, INDEX, SCALE).tolist() == [[6.0, 8.5], [11.0, 16.0]]


def test_positions_are_row_major():
    lora_a, lora_b = torch.zeros(1, 3), torch.zeros(2, 1)
    weight = dense_weight(lora_a, lora_b, torch.ones(1), torch.tensor([3]), 1.0)
    assert weight.tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 1, 2)])
def test_values_and_gradients_of_a_small_layer(shape):
    inputs = torch.ones(shape, requires_grad=True)
    parts = [part.clone().requires_grad_() for part in (A, B, VALUE)]
    outputs = sparse_low_rank(inputs, *parts, INDEX, SCALE)
    assert outputs.flatten().tolist() == [14.5, 27.0]
    outputs.backward(torch.tensor([1.0, -1.0]).view(shape))
    assert parts[0].grad.tolist() == [[-2.0, -2.0]]
    assert parts[1].grad.tolist() == [[14.0], [-14.0]]
    assert parts[2].grad.tolist() == [1.0, -1.0]
    assert inputs.grad.flatten().tolist() == [-5.0, -7.5]


def test_gradients_agree_with_finite_differences():
    lora_a, lora_b, value, index = random_parts()
    inputs = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def compute(*tensors):
        return sparse_low_rank(*tensors, index, 0.7)

    assert gradcheck(compute, (inputs, lora_a, lora_b, value))


@pytest.mark.parametrize("number", [0, 4, 15])
def test_values_and_gradients_agree_with_the_definition(number):
    *trained, index = random_parts(number=number)
    inputs = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, 5, dtype=torch.float64)
    results = []
    for compute in (sparse_low_rank, definition):
        outputs = compute(inputs, *trained, index, 0.25)
        gradients = torch.autograd.grad((outputs * weights).sum(), [inputs, *trained])
        results.append([outputs, *gradients])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_can_be_computed_alone(wanted):
    tensors = [torch.randn(4, 3, dtype=torch.float64), *random_parts()]
    *tensors, index = [tensor.detach() for tensor in tensors]
    tensors[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(
        sparse_low_rank(*tensors, index, 0.5).square().sum(), tensors[wanted]
    )
    (expected,) = torch.autograd.grad(
        definition(*tensors, index, 0.5).square().sum(), tensors[wanted]
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def saved_bytes(compute):
    """Return the result and the bytes of each storage that autograd saved."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return result, sorted(storages.values())


def test_forward_saves_its_arguments_and_nothing_dense():
    *parts, index = random_parts(64, 96, rank=4, number=30, dtype=torch.float32)
    inputs = torch.randn(8, 64, requires_grad=True)
    _, sizes = saved_bytes(lambda: sparse_low_rank(inputs, *parts, index, 1.0))
    arguments = {"x": 8 * 64, "A": 4 * 64, "B": 96 * 4, "values": 30, "positions": 30}
    assert sizes == sorted(4 * number for number in arguments.values())
    assert sum(sizes) < 4 * 64 * 96


def test_backward_saves_nothing():
    *parts, index = random_parts(64, 96, rank=4, number=30, dtype=torch.float32)
    outputs = sparse_low_rank(torch.randn(8, 64, requires_grad=True), *parts, index, 1.0)
    _, sizes = saved_bytes(lambda: outputs.sum().backward())
    assert sizes == []


class CountDense(TorchDispatchMode):
    """Count the dense storages that exist at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.storages, self.most = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() == self.size:
            storage = StorageWeakRef(result.untyped_storage())
            self.storages[storage.cdata] = storage
        self.storages = {key: s for key, s in self.storages.items() if not s.expired()}
        self.most = max(self.most, len(self.storages))
        return result


def test_one_dense_matrix_exists_at_a_time():
    *parts, index = random_parts(64, 96, rank=4, number=30, dtype=torch.float32)
    inputs = torch.randn(8, 64, requires_grad=True)
    with CountDense(4 * 64 * 96) as forward:
        loss = sparse_low_rank(inputs, *parts, index, 1.0).sum()
    with CountDense(4 * 64 * 96) as backward:
        loss.backward()
    assert (forward.most, backward.most) == (1, 1)
    assert not forward.storages
    assert not backward.storages


def test_nothing_is_saved_if_nothing_trains():
    *parts, index = [part.detach() for part in random_parts()]
    _, sizes = saved_bytes(lambda: sparse_low_rank(torch.randn(8, 3).double(), *parts, index, 1.0))
    assert sizes == []


def test_outputs_have_the_dtype_of_inputs_and_gradients_of_weights():
    *parts, index = random_parts(dtype=torch.float32)
    inputs = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    outputs = sparse_low_rank(inputs, *parts, index, 0.5)
    expected = definition(inputs.float(), *parts, index, 0.5)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.02, atol=0.05)
    outputs.sum().backward()
    assert (outputs.dtype, inputs.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert [part.grad.dtype for part in parts] == [torch.float32] * 3


@pytest.mark.parametrize(("number", "size"), [(0, 6), (1, 1), (7, 100), (60, 100), (100, 100)])
def test_positions_are_distinct_and_ascending_one_per_value(number, size):
    positions = draw_support(torch.empty(number), size, 3).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == number
    assert set(positions) <= set(range(size))


@pytest.mark.parametrize("number", [2, 3])
def test_every_support_is_equally_likely(number):
    draws = 5000  # over the 10 subsets of 2 or 3 out of 5
    counts = dict.fromkeys(combinations(range(5), number), 0)
    for seed in range(draws):
        counts[tuple(draw_support(torch.empty(number), 5, seed).tolist())] += 1
    error = (draws * 0.1 * 0.9) ** 0.5
    assert max(abs(count - draws / 10) for count in counts.values()) < 4 * error


def test_a_seed_fixes_the_positions():
    one, same, other = (draw_support(torch.empty(20), 1000, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_default_generator_is_not_changed_by_a_seed():
    before = torch.get_rng_state()
    draw_support(torch.empty(20), 1000, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_are_int32_if_they_fit():
    assert draw_support(torch.empty(2), 2**31 - 1, 0).dtype == torch.int32
    assert draw_support(torch.empty(2), 2**31, 0).dtype == torch.int64


def test_meta_and_fake_values_draw_no_positions():
    assert draw_support(torch.empty(3, device="meta"), 10, 0).is_meta
    with FakeTensorMode():
        positions = draw_support(torch.empty(3), 10, 0)
    assert isinstance(positions, FakeTensor)
    assert positions.shape == (3,)

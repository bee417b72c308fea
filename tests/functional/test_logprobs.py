"""Log-probs in chunks: the numbers of the plain formula in less memory."""

import math
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.functional.logprobs import chosen_logprobs

HIDDEN, VOCABULARY = 12, 50
LIMIT = 1024  # tokens whose logits may exist at once
CHUNK = LIMIT // 2


def head(*shape, dtype=torch.float32, spread=1.0):
    """Return hidden, weight, bias and tokens; the first three require gradients."""
    hidden = torch.randn(*shape, HIDDEN).to(dtype).requires_grad_()
    weight = (spread * torch.randn(VOCABULARY, HIDDEN)).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCABULARY, shape)


def formula(hidden, weight, tokens, *, bias=None, temperature=1.0, dtype=torch.float32):
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = (logits if bias is None else logits + bias.to(dtype)) / temperature
    table = logits.log_softmax(-1)
    chosen = table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -(table.exp() * table).sum(-1).detach()


def test_temperature_and_bias_change_the_distribution():
    """Logits 0 and log 3 give probabilities 1/4 and 3/4; at temperature 1/2, 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    tokens = torch.tensor([0, 1])
    logprobs, entropy = chosen_logprobs(hidden, weight, tokens)
    assert logprobs.exp().tolist() == pytest.approx([0.25, 0.75])
    assert entropy.tolist() == pytest.approx([0.5623351] * 2)
    logprobs, _ = chosen_logprobs(hidden, weight, tokens, temperature=0.5)
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.9])
    bias = torch.tensor([math.log(3), 0.0])
    logprobs, entropy = chosen_logprobs(hidden, weight, tokens, bias=bias)
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5])
    assert entropy.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (CHUNK,), (CHUNK + 1,), (2, 3, 200)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_give_the_numbers_and_gradients_of_the_formula(
    assert_close, shape, temperature, with_bias
):
    hidden, weight, bias, tokens = head(*shape, spread=2.0)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    settings = {"temperature": temperature, "bias": bias if with_bias else None}
    upstream = torch.randn(shape) / max(tokens.numel(), 1)
    results = []
    for function in (chosen_logprobs, formula):
        logprobs, entropy = function(hidden, weight, tokens, **settings)
        gradients = torch.autograd.grad((upstream * logprobs).sum(), inputs)
        assert not entropy.requires_grad
        results.append((logprobs, entropy, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.detach(), 1e-6 if actual.shape != shape else 5e-6)


def test_chunks_do_not_add_rounding_errors():
    """The difference from the plain fp32 formula is at most 1e-6 of the largest number."""
    hidden, weight, bias, tokens = head(3000)
    logprobs, entropy = chosen_logprobs(hidden, weight, tokens, bias=bias)
    expected, expected_entropy = formula(hidden, weight, tokens, bias=bias)
    assert (logprobs - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (entropy - expected_entropy).abs().max() <= 1e-6 * expected_entropy.abs().max()


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, tokens = head(2, 3, dtype=torch.double)
    _, analytic = torch.autograd.functional.vjp(
        lambda *inputs: chosen_logprobs(*inputs[:2], tokens, bias=inputs[2], temperature=0.7)[0],
        (hidden, weight, bias),
        torch.ones(2, 3),
    )
    for inputs, gradient in zip((hidden, weight, bias), analytic, strict=True):
        direction = torch.randn_like(inputs)
        sums = []
        for step in (1e-6, -1e-6):
            moved = {id(x): x for x in (hidden, weight, bias)}
            moved[id(inputs)] = inputs + step * direction
            logprobs, _ = formula(
                moved[id(hidden)],
                moved[id(weight)],
                tokens,
                bias=moved[id(bias)],
                temperature=0.7,
                dtype=torch.double,
            )
            sums.append(logprobs.sum().item())
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_inputs_that_require_gradients_get_them(assert_close, wanted):
    hidden, weight, bias, tokens = head(1500)
    inputs = (hidden, weight, bias)
    for tensor, requires_grad in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(requires_grad)
    chosen_logprobs(hidden, weight, tokens, bias=bias)[0].mean().backward()
    assert tuple(tensor.grad is not None for tensor in inputs) == wanted
    (trained,) = (tensor for tensor in inputs if tensor.requires_grad)
    expected = formula(hidden, weight, tokens, bias=bias)[0].mean()
    assert_close(trained.grad, torch.autograd.grad(expected, trained)[0], 1e-6)


def test_results_under_no_grad_require_no_gradients():
    hidden, weight, _, tokens = head(5)
    with torch.no_grad():
        logprobs, entropy = chosen_logprobs(hidden, weight, tokens)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_fp32_and_gradients_have_the_dtype_of_their_inputs(assert_close, dtype):
    hidden, weight, bias, tokens = head(2, 700, dtype=dtype)
    logprobs, entropy = chosen_logprobs(hidden, weight, tokens, bias=bias)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected, expected_entropy = formula(hidden, weight, tokens, bias=bias)
    assert_close(logprobs, expected.detach(), 5e-6)
    assert_close(entropy, expected_entropy, 5e-6)
    gradients = torch.autograd.grad(logprobs.mean(), (hidden, weight, bias))
    references = torch.autograd.grad(expected.mean(), (hidden, weight, bias))
    for actual, reference in zip(gradients, references, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, reference, rtol=1e-2, atol=1e-6)


def assert_equal_to_formula_in_half_precision(device):
    hidden, weight, bias, tokens = (
        tensor.detach().to(device) for tensor in head(700, dtype=torch.bfloat16)
    )
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logprobs, _ = chosen_logprobs(hidden, weight, tokens, bias=bias)
    expected, _ = formula(hidden, weight, tokens, bias=bias)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(logprobs.mean(), inputs)
    references = torch.autograd.grad(expected.mean(), inputs)
    for actual, reference in zip(gradients, references, strict=True):
        assert (actual - reference).norm() < 1e-2 * reference.norm()


def test_half_precision_factors_with_fp32_sums(monkeypatch):
    """The code path of a GPU, with a replacement of its matrix product."""

    def mm(left, right, out_dtype):
        assert left.dtype == right.dtype == torch.bfloat16
        return (left.double() @ right.double()).to(out_dtype)

    monkeypatch.setattr("lit_align.functional.logprobs._matmul_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(torch, "mm", mm)
    assert_equal_to_formula_in_half_precision("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_on_a_gpu():
    assert_equal_to_formula_in_half_precision("cuda")


def test_the_weight_gradient_is_summed_in_fp32():
    """A bfloat16 sum over 8,192 equal tokens would stop growing."""
    hidden = torch.ones(8192, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(8192, dtype=torch.long)
    chosen_logprobs(hidden, weight, tokens)[0].sum().backward()
    assert weight.grad.flatten().tolist() == [4096, -4096]


def test_autocast_does_not_lower_the_precision():
    hidden, weight, bias, tokens = head(5)
    plain = chosen_logprobs(hidden, weight, tokens, bias=bias)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = chosen_logprobs(hidden, weight, tokens, bias=bias)[0]
        (gradient,) = torch.autograd.grad(cast.sum(), hidden)
    assert torch.equal(cast, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), hidden)[0])


def test_large_and_infinite_logits_give_finite_entropy():
    hidden, tokens = torch.full((2, 1), 100.0), torch.tensor([0, 1])
    weight = torch.tensor([[100.0], [99.0], [0.0]])
    bias = torch.tensor([0.0, 0.0, -math.inf])
    logprobs, entropy = chosen_logprobs(hidden, weight, tokens, bias=bias)
    assert logprobs.tolist() == [0, -100]
    assert entropy.tolist() == pytest.approx([0, 0], abs=1e-6)


class Watch(TorchDispatchMode):
    """Record all new tensors, and how many of the size of a chunk exist at once."""

    def __init__(self):
        super().__init__()
        self.made, self.alive, self.peak = [], set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.made.append((tensor.dtype, tensor.shape))
            storage = tensor.untyped_storage().data_ptr()
            if tensor.numel() == CHUNK * VOCABULARY and storage not in self.alive:
                self.alive.add(storage)
                self.peak = max(self.peak, len(self.alive))
                weakref.finalize(tensor, self.alive.discard, storage)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_1024_tokens_of_logits_exist_at_once(dtype):
    """Nothing of vocabulary size is saved for backward, except the weight and the bias."""
    hidden, weight, bias, tokens = head(3, 1500, dtype=dtype)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with Watch() as watch, saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = chosen_logprobs(hidden, weight, tokens, bias=bias, temperature=0.7)
        assert watch.peak * CHUNK == LIMIT
        watch.peak = 0
        logprobs.sum().backward()
    assert watch.peak == 1
    of_vocabulary_size = [shape for _, shape in watch.made if VOCABULARY in shape]
    assert max(shape.numel() for shape in of_vocabulary_size) <= LIMIT * VOCABULARY
    parameters = {weight.data_ptr(), bias.data_ptr()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in parameters]
    assert not any(VOCABULARY in tensor.shape for tensor in others)
    assert sum(tensor.numel() for tensor in others) <= hidden.numel() + 2 * tokens.numel()


def test_half_precision_inputs_are_converted_in_chunks():
    hidden, weight, _, tokens = head(3000, dtype=torch.bfloat16)
    with Watch() as watch:
        chosen_logprobs(hidden, weight, tokens)[0].sum().backward()
    wide = [shape for dtype, shape in watch.made if dtype == torch.float32]
    assert max(len(shape) and shape[0] for shape in wide if shape[-1:] == (HIDDEN,)) <= CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_on_fake_tensors(dtype):
    with FakeTensorMode():
        hidden, weight, bias, tokens = head(2, 1500, dtype=dtype)
        logprobs, entropy = chosen_logprobs(hidden, weight, tokens, bias=bias)
        logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (2, 1500)
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_with_openrlhf(assert_close, golden, temperature):
    """An identity weight makes the hidden states the logits."""
    file = golden("openrlhf_misc")
    suffix = "" if temperature == 1 else f",temperature={temperature}"
    logprobs, _ = chosen_logprobs(
        file["logits"], torch.eye(11), file["ids"], temperature=temperature
    )
    assert_close(logprobs, file.cases[f"log_probs_from_logits{suffix}"])


def test_summed_logprobs_agree_with_the_released_code_of_dpo(assert_close, golden):
    """The logits at t - 1 score the label at t."""
    file = golden("dpo_reference")
    case = file.cases["get_batch_logps,average=False"]
    logits, labels = file["logits"].requires_grad_(), file["labels"][:, 1:]
    mask = labels != -100
    logprobs, _ = chosen_logprobs(logits[:, :-1], torch.eye(11), labels.where(mask, 0))
    summed = torch.where(mask, logprobs, 0).sum(-1)
    assert_close(summed, case["logps"])
    assert_close(torch.autograd.grad(summed.sum(), logits)[0], case["grad_logits_of_sum"])


def test_supervised_loss_agrees_with_openrlhf(assert_close, golden):
    file = golden("openrlhf_sft_loss")
    case = file.cases["GPTLMLoss"]
    logits, labels = file["logits"].requires_grad_(), file["labels"][:, 1:]
    mask = labels != -100
    logprobs, _ = chosen_logprobs(logits[:, :-1], torch.eye(11), labels.where(mask, 0))
    loss = -torch.where(mask, logprobs, 0).sum() / mask.sum()
    assert_close(loss, case["loss"])
    assert_close(torch.autograd.grad(loss, logits)[0], case["grad_logits"])

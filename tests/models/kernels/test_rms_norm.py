"""Norms by torch's own function say what transformers' say, under the same names."""

import pytest
import torch
from tiny_models import TINY, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_align.models.kernels.rms_norm import RMSNorm, replace_rms_norms
from lit_align.plan.dispatch_mode import attribute_to
from lit_align.plan.memory_tracker import MemoryLocation, MemoryTracker
from lit_align.plan.simulate import Machine, simulation

NORMS = {"llama": 5, "qwen3": 9, "olmo2": 9, "granite": 5}  # of two blocks; some also of heads


def network(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, "model_type": name, "head_dim": 16})
    found = AutoModelForCausalLM.from_config(config)
    for weight in found.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return found


def replaced(model) -> int:
    return sum(isinstance(module, RMSNorm) for module in model.modules())


def passed(model):
    """Logits, and all gradients."""
    logits = model(torch.arange(3, 20).unsqueeze(0)).logits
    logits.square().sum().backward()
    return logits.detach(), [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("name", NORMS)
def test_networks_say_the_same(name):
    theirs, ours = network(name), network(name)
    replace_rms_norms(ours)
    assert replaced(ours) == NORMS[name]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    (logits, grads), (expected, others) = passed(ours), passed(theirs)
    assert torch.equal(logits, expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "gpt_neox", "mamba2"])
def test_norms_that_say_something_else_stay(name):
    """One plus the weight, a mean that is taken away, a gate."""
    config = {"gpt_neox": {}, "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}}
    settings = {**TINY, "model_type": name, "head_dim": 16, **config.get(name, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    kinds = [type(module) for module in model.modules()]
    replace_rms_norms(model)
    gates = [kind for kind in kinds if "Gated" in kind.__name__]
    after = [type(module) for module in model.modules()]
    assert [kind for kind in after if "Gated" in kind.__name__] == gates
    assert name == "mamba2" or after == kinds


def test_a_policy_has_them():
    assert replaced(tiny()) == 5


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_types_are_those_of_transformers(kind, weight, given):
    """Autocast gives heads halves beside fp32 weights; FSDP2 gives blocks the other way round."""
    theirs = kind(8, eps=1e-5).to(weight)
    torch.nn.init.uniform_(theirs.weight)
    x = torch.randn(3, 8).to(given)
    holder = torch.nn.ModuleList([theirs])
    replace_rms_norms(holder)
    said, expected = holder[0](x), theirs(x)
    assert isinstance(holder[0], RMSNorm)
    assert said.dtype == expected.dtype
    tolerance = 0.01 if torch.bfloat16 in (weight, given) else 1e-6
    torch.testing.assert_close(said, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_that_are_built_in_halves_have_them_too(dtype):
    """As bf16-true builds them: whatever is made there without a type is of that one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert replaced(tiny()) == 5
    finally:
        torch.set_default_dtype(before)


def test_autocast_of_a_gpu_does_not_widen_halves():
    """torch has rms_norm return fp32 there; adapters' frozen bases are halves under bf16-mixed."""
    norm = RMSNorm(Qwen3RMSNorm(8), 1e-6).bfloat16()
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            sizes = ((3, 8), (8,))
            x, weight = (torch.empty(*n, dtype=torch.bfloat16, device="cuda") for n in sizes)
            assert torch.nn.functional.rms_norm(x, (8,), weight, 1e-6).dtype is torch.float32
            assert functional_call(norm, {"weight": weight}, (x,)).dtype is torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", False)


class Elsewhere(Qwen3RMSNorm):
    """Adds eps outside of the root."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


def test_a_norm_that_adds_eps_elsewhere_stays():
    holder = torch.nn.ModuleList([Elsewhere(8)])
    replace_rms_norms(holder)
    assert isinstance(holder[0], Elsewhere)


class Operators(TorchDispatchMode):
    """Counts operators that are kernels on a GPU."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_transformers_takes_eight_kernels_for_halves():
    """To fp32, square, mean, eps, root, product, to halves, weight."""
    norm, x = Qwen3RMSNorm(8).bfloat16(), torch.ones(3, 8, dtype=torch.bfloat16)
    with torch.no_grad(), Operators() as operators:
        norm(x)
    assert operators.number == 8


def test_by_hand():
    """(3, 4): the root of the mean square is the root of 12.5."""
    norm = RMSNorm(Qwen3RMSNorm(2), 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    said = norm(torch.tensor([3.0, 4.0])).tolist()
    assert said == pytest.approx([3 / 12.5**0.5, 40 / 12.5**0.5])


def test_networks_without_values_are_told_apart_too():
    """In a plan, where nothing has values."""
    with simulation(MemoryTracker(), Machine()):
        llama, gemma = network("llama"), network("gemma")
        replace_rms_norms(llama)
        replace_rms_norms(gemma)
    assert (replaced(llama), replaced(gemma)) == (5, 0)


def test_a_plan_counts_one_kernel():
    """Of 1,000 rows of 512 halves a GPU keeps the input and a float each; the CPU does more."""
    norm, kept = RMSNorm(Qwen3RMSNorm(512), 1e-6).bfloat16(), {}
    for is_gpu in (True, False):
        tracker = MemoryTracker()
        with (
            simulation(tracker, Machine(is_gpu=is_gpu)),
            attribute_to(tracker, None, MemoryLocation.DEVICE),
        ):
            x = torch.zeros(1000, 512, dtype=torch.bfloat16, requires_grad=True)
            before = tracker.total[MemoryLocation.DEVICE]
            normed = norm(x)
            kept[is_gpu] = tracker.total[MemoryLocation.DEVICE] - before - normed.nbytes
    assert kept[True] == 4000
    assert kept[False] > 2 * 1000 * 512

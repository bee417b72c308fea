"""RMSNorm by torch's fused function returns what the norms of transformers return."""

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

NUM_NORMS = {"llama": 5, "qwen3": 9, "olmo2": 9, "granite": 5}  # in two blocks


def build_network(name: str):
    """Return a tiny network of an architecture, with the same weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, "model_type": name, "head_dim": 16})
    found = AutoModelForCausalLM.from_config(config)
    for weight in found.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return found


def num_replaced(model) -> int:
    """Return the number of norms that were replaced."""
    return sum(isinstance(module, RMSNorm) for module in model.modules())


def logits_and_gradients(model):
    """Return the logits of one text and the gradients of all weights."""
    logits = model(torch.arange(3, 20).unsqueeze(0)).logits
    logits.square().sum().backward()
    return logits.detach(), [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("name", NUM_NORMS)
def test_replaced_norms_do_not_change_a_network(name):
    original, changed = build_network(name), build_network(name)
    replace_rms_norms(changed)
    assert num_replaced(changed) == NUM_NORMS[name]
    assert list(changed.state_dict()) == list(original.state_dict())
    logits, grads = logits_and_gradients(changed)
    expected_logits, expected_grads = logits_and_gradients(original)
    assert torch.equal(logits, expected_logits)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "gpt_neox", "mamba2"])
def test_other_norms_are_not_replaced(name):
    """A factor of 1 + weight, a subtracted mean, and a gate."""
    config = {"gpt_neox": {}, "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}}
    settings = {**TINY, "model_type": name, "head_dim": 16, **config.get(name, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    kinds = [type(module) for module in model.modules()]
    replace_rms_norms(model)
    gates = [kind for kind in kinds if "Gated" in kind.__name__]
    after = [type(module) for module in model.modules()]
    assert [kind for kind in after if "Gated" in kind.__name__] == gates
    assert name == "mamba2" or after == kinds


def test_norms_of_a_policy_are_replaced():
    assert num_replaced(tiny()) == 5


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_those_of_transformers(kind, weight_dtype, input_dtype):
    """Autocast has half-precision inputs and fp32 weights, FSDP2 the reverse in its blocks."""
    original = kind(8, eps=1e-5).to(weight_dtype)
    torch.nn.init.uniform_(original.weight)
    x = torch.randn(3, 8).to(input_dtype)
    holder = torch.nn.ModuleList([original])
    replace_rms_norms(holder)
    found, expected = holder[0](x), original(x)
    assert isinstance(holder[0], RMSNorm)
    assert found.dtype == expected.dtype
    tolerance = 0.01 if torch.bfloat16 in (weight_dtype, input_dtype) else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_a_half_precision_network_are_replaced(dtype):
    """bf16-true sets the default dtype while a network is built. The test input ignores it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert num_replaced(tiny()) == 5
    finally:
        torch.set_default_dtype(before)


def test_gpu_autocast_keeps_half_precision():
    """torch's rms_norm returns fp32 there. Frozen bases of adapters are bf16 under bf16-mixed."""
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


class EpsOutsideRoot(Qwen3RMSNorm):
    """Norm that adds eps to the root instead of the mean."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


def test_a_norm_with_eps_outside_the_root_is_not_replaced():
    holder = torch.nn.ModuleList([EpsOutsideRoot(8)])
    replace_rms_norms(holder)
    assert isinstance(holder[0], EpsOutsideRoot)


class KernelCounter(TorchDispatchMode):
    """Counter of operators that launch a kernel on a GPU."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_transformers_runs_eight_kernels_in_half_precision():
    """Cast to fp32, square, mean, eps, root, product, cast back, weight."""
    norm, x = Qwen3RMSNorm(8).bfloat16(), torch.ones(3, 8, dtype=torch.bfloat16)
    with torch.no_grad(), KernelCounter() as kernels:
        norm(x)
    assert kernels.number == 8


def test_norm_by_hand():
    """(3, 4): the root of the mean square is the root of 12.5."""
    norm = RMSNorm(Qwen3RMSNorm(2), 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    found = norm(torch.tensor([3.0, 4.0])).tolist()
    assert found == pytest.approx([3 / 12.5**0.5, 40 / 12.5**0.5])


def test_norms_of_a_plan_are_replaced_without_values():
    """Weights are fake tensors there; the test input is real."""
    with simulation(MemoryTracker(), Machine()):
        llama, gemma = build_network("llama"), build_network("gemma")
        replace_rms_norms(llama)
        replace_rms_norms(gemma)
    assert (num_replaced(llama), num_replaced(gemma)) == (5, 0)


def test_plan_counts_one_kernel():
    """With 1,000 rows of 512 bf16 numbers, a GPU keeps the input and one float per row."""
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

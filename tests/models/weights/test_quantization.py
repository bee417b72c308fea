"""Bases in 8 and 4 bits with adapters: bytes, rounding, gradients, saving and refusals."""

import json
import math
import socket
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import PeftModel
from spawn_ranks import Ranks
from tiny_models import TINY, RandomPrompts, RandomTexts, distance, tiny, trained, trainer, weights
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.sft import SFT
from lit_align.batches import TextBatch
from lit_align.models import merge_adapter as merging
from lit_align.models.adapters.lora import LoRA
from lit_align.models.adapters.sparse_lora import SparseLowRankAdapter
from lit_align.models.hydra import ACTOR, CRITIC, Hydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.roles import role_table
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.sltrain import SLTrain
from lit_align.models.weights import torchao as torchao_weights
from lit_align.models.weights.quantization import QuantizedLinear
from lit_align.models.weights.torchao import Int8Weights, NF4Weights

torchao = pytest.importorskip("torchao.quantization", reason="torchao makes the codes")

SCHEMES = [Int8Weights, NF4Weights]
LOUD = {**TINY, "initializer_range": 0.2}  # so that outputs depend on the blocks
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS, dtype=torch.bool)
TEXTS = TextBatch(tokens=IDS, token_mask=ONES, target_mask=ONES, lengths=[9, 9])


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Yield two processes for the tests of this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    yield ranks
    ranks.close()


def build(scheme, kind=Policy, **settings):
    """Return the same random base each time, quantized or not, with random adapters of rank 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoRA(r=2, lora_alpha=4)
        network = kind(**{"config": dict(LOUD), "lora": lora, **settings}, quantization=scheme)
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
    return network


def linears(network) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}


def weights_of(network) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def frozen(network) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad}


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dequantized(quantized, kind=Policy):
    """Return an unquantized float32 network with the dequantized weights of another."""
    reference = build(None, kind)
    dense = {name: layer.dense() for name, layer in linears(quantized).items()}
    with torch.no_grad():
        for name, weight in dense.items():
            reference.get_submodule(name).weight.copy_(weight)
    return reference


# Codes --------------------------------------------------------------------------------------------


def test_int8_codes_computed_by_hand():
    """The largest number of a row is 127.5 steps, so 2.55 is quantized as 127 steps of 0.02."""
    weight = torch.tensor([[2.55, 1.0, -0.3], [0.0, -1.275, 0.005]])
    codes, scale = Int8Weights().quantize(weight)
    assert codes.tolist() == [[127, 50, -15], [0, -128, 0]]
    torch.testing.assert_close(scale, torch.tensor([[0.02], [0.01]]))


def test_nf4_codes_computed_by_hand():
    """With one scale, 2, each of the 16 numbers times 2 is quantized exactly."""
    table = NF4Weights().quantize(torch.ones(1, 64))[-1]
    weight = 2 * table.repeat(8).view(2, 64)
    codes, scales, factor, mean, _ = parts = NF4Weights().quantize(weight)
    assert codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert (scales.tolist(), factor.tolist(), mean.tolist()) == ([0, 0], [1.0], [2.0])
    assert torch.equal(NF4Weights().dequantize(parts, torch.float32).view(2, 64), weight)


@pytest.mark.parametrize("shape", [(16, 32), (96, 320), (256, 256)])
def test_dequantized_weights_equal_those_of_torchao(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    eight = torchao.Int8Tensor.from_hp(weight, torchao.PerRow()).dequantize()
    blocks = weight.numel() // 64
    four = torchao.to_nf4(weight, 64, math.gcd(blocks, 256)).get_original_weight()
    for scheme, expected in ((Int8Weights(), eight), (NF4Weights(), four)):
        decoded = scheme.dequantize(scheme.quantize(weight), torch.float32).view(shape)
        assert torch.equal(decoded, expected)


def test_int8_rounding_error_is_at_most_half_a_step():
    weight = torch.randn(50, 80, generator=torch.Generator().manual_seed(1))
    scheme = Int8Weights()
    off = (scheme.dequantize(scheme.quantize(weight), torch.float32) - weight).abs()
    assert (off / weight.abs().amax(-1, keepdim=True)).max() <= 1 / 255 + 1e-6


def formula(scheme, n_out: int, n_in: int) -> int:
    """Return the bytes of a quantized weight."""
    n = n_out * n_in
    if scheme is Int8Weights:
        return n + 4 * n_out
    return n // 2 + n // 64 + 4 * (n // 64 // math.gcd(n // 64, 256)) + 68


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_equal_the_formula(scheme, dtype):
    layers = linears(build(scheme(), dtype=dtype))
    assert len(layers) == 14
    for layer in layers.values():
        assert size(layer.parameters()) == formula(scheme, layer.out_features, layer.in_features)


def test_a_layer_takes_a_quarter_and_an_eighth_of_float32():
    layer = nn.Linear(1024, 1024, bias=False)
    shares = [size(QuantizedLinear(layer, s()).parameters()) / (4 * 1024**2) for s in SCHEMES]
    assert shares == pytest.approx([0.2510, 0.1290], abs=1e-4)


def test_the_role_table_counts_the_bytes_of_codes():
    quantized = build(Int8Weights())
    algorithm = ReMax(policy=lambda: quantized)
    algorithm.configure_model()
    first = role_table(algorithm.all_roles())[1]
    assert int(first.split()[-1].replace(",", "")) == size(quantized.parameters())


# A network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bound"), [(Int8Weights, 0.03), (NF4Weights, 0.6)])
def test_logprobs_are_near_those_of_the_unquantized_base(scheme, bound):
    quantized, reference = build(scheme()).logprobs(TEXTS), build(None).logprobs(TEXTS)
    assert 0 < (quantized - reference).abs().max() < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_equal_those_of_dequantized_weights(scheme):
    quantized = build(scheme())
    reference = dequantized(quantized)
    for network in (quantized, reference):
        network.logprobs(TEXTS).sum().backward()
    assert torch.equal(quantized.logprobs(TEXTS), reference.logprobs(TEXTS))
    grads = [[weight.grad for weight in weights_of(network)] for network in (quantized, reference)]
    assert len(grads[0]) == 28
    assert distance(*grads) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_to_half_precision_does_not_change_the_base(scheme):
    quantized = build(scheme())
    before = [layer.dense() for layer in linears(quantized).values()]
    quantized.to(torch.bfloat16)
    assert all(map(torch.equal, before, [layer.dense() for layer in linears(quantized).values()]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_quantized_parts_are_saved_for_backward(scheme):
    quantized, kept = build(scheme()), []
    layer = linears(quantized)["network.model.layers.0.mlp.down_proj.base_layer"]
    inputs = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in layer.parameters()}


def test_autocast_sets_the_dtype_of_the_product():
    layer = QuantizedLinear(nn.Linear(64, 32), Int8Weights())
    inputs = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
    assert outputs.dtype == torch.bfloat16
    expected = inputs.bfloat16() @ layer.dense().bfloat16().T + layer.bias.bfloat16()
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    assert inputs.grad.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recomputed_blocks_have_equal_gradients(scheme):
    plain, again = build(scheme()), build(scheme(), activation_checkpointing=True)
    for network in (plain, again):
        network.logprobs(TEXTS).sum().backward()
    grads = [[w.grad for w in weights_of(network)] for network in (plain, again)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_disabled_adapters_give_the_base(scheme):
    quantized = build(scheme())
    adapted = quantized.logprobs(TEXTS)
    with quantized.adapters.disable_all():
        base = quantized.logprobs(TEXTS)
    assert not torch.equal(base, adapted)
    for name, weight in quantized.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    assert torch.equal(quantized.logprobs(TEXTS), base)
    reference = dequantized(quantized)
    with reference.adapters.disable_all():
        assert torch.equal(reference.logprobs(TEXTS), base)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_copy_shares_no_memory(scheme):
    quantized = build(scheme())
    copy = deepcopy(quantized)
    assert torch.equal(copy.logprobs(TEXTS), quantized.logprobs(TEXTS))
    assert not {p.data_ptr() for p in copy.parameters()} & {
        p.data_ptr() for p in quantized.parameters()
    }
    assert copy.fingerprint == quantized.fingerprint != build(None).fingerprint


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_train_and_the_base_does_not_change(scheme, tmp_path):
    quantized = build(scheme())
    before, start = frozen(quantized), weights(quantized)
    algorithm = SFT(policy=lambda: quantized, optimizer=lambda p: AdamW(p, lr=1e-2))
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(algorithm, RandomTexts(3))
    assert not any(map(torch.equal, weights(quantized), start))
    after = frozen(quantized)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_has_only_adapters_and_the_base_is_reproducible(run, tmp_path):
    algorithm = ReMax(policy=lambda: build(Int8Weights()))
    done = run(algorithm, 1)
    assert algorithm.reference_model.fingerprint == build(Int8Weights()).fingerprint
    done.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 2 * 28  # under the network's and under peft's names
    assert all(".lora_" in name for name in saved)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Return the folder of a two-headed model."""
    folder = tmp_path_factory.mktemp("two_headed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PolicyWithRewardHead(config=dict(LOUD)).save(folder)
    return str(folder)


def test_a_saved_adapter_has_the_path_of_its_base(base, tmp_path):
    quantized = build(Int8Weights(), path=base)
    quantized.save(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == base
    )
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    expected = build(None, path=base)
    assert torch.equal(reference(IDS).logits, expected.network(IDS).logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merged_network_has_plain_dequantized_weights(scheme, tmp_path):
    quantized = build(scheme(), lora=LoRA(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    merging.merge_adapter(quantized, "default").save_pretrained(tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(plain(IDS).logits, quantized.network(IDS).logits, rtol=0, atol=1e-5)
    assert len(linears(quantized)) == 14  # the original is unchanged


def test_an_adapter_folder_is_merged_before_quantization(base, tmp_path):
    build(Int8Weights(), path=base).save(tmp_path)
    merged = build(None, path=str(tmp_path))
    quantized = build(Int8Weights(), path=str(tmp_path))
    for name, layer in linears(quantized).items():
        weight = merged.get_submodule(name).weight
        assert (layer.dense() - weight).abs().max() <= weight.abs().max() / 254


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_critic_can_have_a_quantized_base(scheme):
    quantized = build(scheme(), ScalarHead)
    values, reference = quantized.values(TEXTS), dequantized(quantized, ScalarHead).values(TEXTS)
    assert torch.equal(values, reference)
    values.sum().backward()
    assert all(weight.grad is not None for weight in weights_of(quantized))
    assert len(weights_of(quantized)) == 29  # with the head


@pytest.mark.parametrize("scheme", SCHEMES)
def test_four_roles_can_share_a_quantized_base(scheme, base, prompts):
    hydra = build(scheme(), Hydra, path=base)
    before = frozen(hydra)
    prompts.responses = torch.randint(3, 32, (4, 4), generator=torch.Generator().manual_seed(3))
    prompts.response_lengths = [4] * 4
    prompts.response_mask = torch.ones(4, 4, dtype=torch.bool)
    scores, reference = hydra.scores_and_ref_logprobs(prompts)
    assert not torch.equal(hydra.logprobs(prompts), reference)
    hydra.logprobs(prompts).sum().backward()
    assert all(w.grad is not None for w in hydra.adapter_weights(ACTOR))
    hydra.state_values(prompts).sum().backward()
    assert all(w.grad is not None for w in hydra.adapter_weights(CRITIC))
    with torch.no_grad():
        for name in (ACTOR, CRITIC):
            for weight in hydra.adapter_weights(name):
                weight -= 0.1 * weight.grad
    again = hydra.scores_and_ref_logprobs(prompts)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], reference)
    assert all(torch.equal(value, frozen(hydra)[name]) for name, value in before.items())


def test_hydra_needs_no_lora_setting_for_quantization(base):
    hydra = Hydra(base, quantization=Int8Weights())
    assert len(linears(hydra)) == 14


# Refusals -----------------------------------------------------------------------------------------

REFUSED = {
    "no adapter": ({"lora": None}, "Set lora, or remove quantization"),
    "SLTrain": (
        {"lora": None, "sltrain": SLTrain(rank=2)},
        "sltrain and quantization cannot be combined",
    ),
    "a sparse adapter": ({"lora": SparseLowRankAdapter(r=2)}, "Use LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incompatible_settings_are_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny(**settings, quantization=Int8Weights())


def test_a_weight_that_64_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"does not divide a layer of \(3, 5\)"):
        NF4Weights().quantize(torch.ones(3, 5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_missing_torchao_is_an_error_with_the_install_command(scheme, monkeypatch):
    monkeypatch.setattr(torchao_weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'torchao>=0.18'"):
        scheme()


# Ranks --------------------------------------------------------------------------------------------


def fit(folder, scheme, world, **settings):
    """Return the adapters after three batches of ReMax, and the policy's bytes on this rank."""
    torch.manual_seed(0)
    algorithm = ReMax(
        policy=partial(build, scheme),
        num_samples=2,
        microbatch_tokens=40,
        optimizer=lambda params: AdamW(params, lr=1e-2),
    )
    run = trainer(folder, limit_val_batches=0, devices=world, **settings)
    run.fit(algorithm, RandomPrompts(3, 4 // world))
    local_weights = [local(weight) for weight in algorithm.policy.parameters()]
    return [weight.float() for weight in trained(algorithm)], size(local_weights)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


RANK_SCHEMES = [Int8Weights, pytest.param(NF4Weights, marks=pytest.mark.long)]


@pytest.mark.parametrize("scheme", RANK_SCHEMES)
@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "fsdp2"])
def test_two_ranks_equal_one_process(two_ranks, tmp_path, scheme, strategy):
    reference, num_bytes = fit(tmp_path, scheme(), 1)
    parts = two_ranks(partial(fit, strategy=strategy), tmp_path, scheme(), 2)
    for trained_here, _ in parts:
        assert distance(trained_here, reference) < 1e-5
    num_copies = 1 if strategy == "fsdp2" else 2
    assert sum(bytes_here for _, bytes_here in parts) == num_copies * num_bytes


@pytest.mark.parametrize("scheme", RANK_SCHEMES)
def test_gathering_in_half_precision_does_not_change_the_base(two_ranks, tmp_path, scheme):
    """DDP does not cast weights, so its base is the quantized one."""
    runs = [
        two_ranks(partial(fit, strategy=strategy, precision="bf16-mixed"), tmp_path, scheme(), 2)
        for strategy in ("ddp_find_unused_parameters_true", "fsdp2")
    ]
    for (replicated, _), (sharded, _) in zip(*runs, strict=True):
        assert distance(sharded, replicated) < 1e-5

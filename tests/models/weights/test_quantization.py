"""Bases of 8 and 4 bits beneath adapters: bytes, rounding, gradients, what is saved, refusals."""

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

torchao = pytest.importorskip("torchao.quantization", reason="codes are made by torchao")

SCHEMES = [Int8Weights, NF4Weights]
LOUD = {**TINY, "initializer_range": 0.2}  # so that answers hang on the blocks
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS, dtype=torch.bool)
TEXTS = TextBatch(tokens=IDS, token_mask=ONES, target_mask=ONES, lengths=[9, 9])


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    yield ranks
    ranks.close()


def build(scheme, kind=Policy, **settings):
    """The same random base each time, coded or whole, with adapters of rank 2 that do something."""
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


def twin(coded, kind=Policy):
    """A network of whole float32 weights that are what the codes stand for."""
    whole, dense = build(None, kind), {n: layer.dense() for n, layer in linears(coded).items()}
    with torch.no_grad():
        for name, weight in dense.items():
            whole.get_submodule(name).weight.copy_(weight)
    return whole


# Codes --------------------------------------------------------------------------------------------


def test_eight_bits_by_hand():
    """The largest number of a row is 127.5 steps; 2.55 is coded as 127 steps of 0.02."""
    weight = torch.tensor([[2.55, 1.0, -0.3], [0.0, -1.275, 0.005]])
    codes, scale = Int8Weights().quantize(weight)
    assert codes.tolist() == [[127, 50, -15], [0, -128, 0]]
    torch.testing.assert_close(scale, torch.tensor([[0.02], [0.01]]))


def test_four_bits_by_hand():
    """Blocks of one size, 2: each of the 16 numbers times 2 is coded without a loss."""
    table = NF4Weights().quantize(torch.ones(1, 64))[-1]
    weight = 2 * table.repeat(8).view(2, 64)
    codes, scales, factor, mean, _ = parts = NF4Weights().quantize(weight)
    assert codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert (scales.tolist(), factor.tolist(), mean.tolist()) == ([0, 0], [1.0], [2.0])
    assert torch.equal(NF4Weights().dequantize(parts, torch.float32).view(2, 64), weight)


@pytest.mark.parametrize("shape", [(16, 32), (96, 320), (256, 256)])
def test_weights_are_decoded_as_torchao_decodes_them(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    eight = torchao.Int8Tensor.from_hp(weight, torchao.PerRow()).dequantize()
    blocks = weight.numel() // 64
    four = torchao.to_nf4(weight, 64, math.gcd(blocks, 256)).get_original_weight()
    for scheme, expected in ((Int8Weights(), eight), (NF4Weights(), four)):
        decoded = scheme.dequantize(scheme.quantize(weight), torch.float32).view(shape)
        assert torch.equal(decoded, expected)


def test_eight_bits_are_off_by_half_a_step_at_most():
    weight = torch.randn(50, 80, generator=torch.Generator().manual_seed(1))
    scheme = Int8Weights()
    off = (scheme.dequantize(scheme.quantize(weight), torch.float32) - weight).abs()
    assert (off / weight.abs().amax(-1, keepdim=True)).max() <= 1 / 255 + 1e-6


def formula(scheme, n_out: int, n_in: int) -> int:
    """Bytes of a coded weight."""
    n = n_out * n_in
    if scheme is Int8Weights:
        return n + 4 * n_out
    return n // 2 + n // 64 + 4 * (n // 64 // math.gcd(n // 64, 256)) + 68


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_formula(scheme, dtype):
    layers = linears(build(scheme(), dtype=dtype))
    assert len(layers) == 14
    for layer in layers.values():
        assert size(layer.parameters()) == formula(scheme, layer.out_features, layer.in_features)


def test_a_layer_of_llama_shrinks_to_a_quarter_and_an_eighth():
    layer = nn.Linear(1024, 1024, bias=False)
    shares = [size(QuantizedLinear(layer, s()).parameters()) / (4 * 1024**2) for s in SCHEMES]
    assert shares == pytest.approx([0.2510, 0.1290], abs=1e-4)


def test_the_table_of_roles_counts_the_codes():
    coded = build(Int8Weights())
    algorithm = ReMax(policy=lambda: coded)
    algorithm.configure_model()
    first = role_table(algorithm.all_roles())[1]
    assert int(first.split()[-1].replace(",", "")) == size(coded.parameters())


# A network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bound"), [(Int8Weights, 0.03), (NF4Weights, 0.6)])
def test_logprobs_stay_near_those_of_the_whole_base(scheme, bound):
    coded, whole = build(scheme()).logprobs(TEXTS), build(None).logprobs(TEXTS)
    assert 0 < (coded - whole).abs().max() < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_computes_what_the_decoded_weights_compute(scheme):
    coded = build(scheme())
    whole = twin(coded)
    for network in (coded, whole):
        network.logprobs(TEXTS).sum().backward()
    assert torch.equal(coded.logprobs(TEXTS), whole.logprobs(TEXTS))
    grads = [[weight.grad for weight in weights_of(network)] for network in (coded, whole)]
    assert len(grads[0]) == 28
    assert distance(*grads) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_to_half_precision_leaves_the_base_as_it_is(scheme):
    coded = build(scheme())
    before = [layer.dense() for layer in linears(coded).values()]
    coded.to(torch.bfloat16)
    assert all(map(torch.equal, before, [layer.dense() for layer in linears(coded).values()]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_dense_is_kept_for_backward(scheme):
    coded, kept = build(scheme()), []
    layer = linears(coded)["network.model.layers.0.mlp.down_proj.base_layer"]
    inputs = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in layer.parameters()}


def test_autocast_sets_the_type_of_the_product():
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
def test_blocks_that_are_computed_again_have_the_same_gradients(scheme):
    plain, again = build(scheme()), build(scheme(), activation_checkpointing=True)
    for network in (plain, again):
        network.logprobs(TEXTS).sum().backward()
    grads = [[w.grad for w in weights_of(network)] for network in (plain, again)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_base_is_what_remains_when_adapters_are_off(scheme):
    coded = build(scheme())
    stirred = coded.logprobs(TEXTS)
    with coded.adapters.disabled():
        base = coded.logprobs(TEXTS)
    assert not torch.equal(base, stirred)
    for name, weight in coded.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    assert torch.equal(coded.logprobs(TEXTS), base)
    whole = twin(coded)
    with whole.adapters.disabled():
        assert torch.equal(whole.logprobs(TEXTS), base)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_copy_is_a_network_of_its_own(scheme):
    coded = build(scheme())
    copy = deepcopy(coded)
    assert torch.equal(copy.logprobs(TEXTS), coded.logprobs(TEXTS))
    assert not {p.data_ptr() for p in copy.parameters()} & {
        p.data_ptr() for p in coded.parameters()
    }
    assert copy.fingerprint == coded.fingerprint != build(None).fingerprint


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_learn_and_the_base_does_not_move(scheme, tmp_path):
    coded = build(scheme())
    before, start = frozen(coded), weights(coded)
    algorithm = SFT(policy=lambda: coded, optimizer=lambda p: AdamW(p, lr=1e-2))
    run = trainer(tmp_path, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(algorithm, RandomTexts(3))
    assert not any(map(torch.equal, weights(coded), start))
    after = frozen(coded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_holds_adapters_alone_and_is_of_this_base(run, tmp_path):
    algorithm = ReMax(policy=lambda: build(Int8Weights()))
    done = run(algorithm, 1)
    assert algorithm.reference_model.fingerprint == build(Int8Weights()).fingerprint
    done.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 2 * 28  # under the network's name and under peft's
    assert all(".lora_" in name for name in saved)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A two-headed model on disk."""
    folder = tmp_path_factory.mktemp("two_headed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PolicyWithRewardHead(config=dict(LOUD)).save(folder)
    return str(folder)


def test_saved_is_an_adapter_that_names_its_base(base, tmp_path):
    coded = build(Int8Weights(), path=base)
    coded.save(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == base
    )
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    expected = build(None, path=base)
    assert torch.equal(whole(IDS).logits, expected.network(IDS).logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_it_is_a_plain_network_of_the_decoded_weights(scheme, tmp_path):
    coded = build(scheme(), lora=LoRA(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    merging.merge_adapter(coded, "default").save_pretrained(tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(plain(IDS).logits, coded.network(IDS).logits, rtol=0, atol=1e-5)
    assert len(linears(coded)) == 14  # the original stays


def test_an_adapters_folder_is_merged_before_its_base_is_coded(base, tmp_path):
    build(Int8Weights(), path=base).save(tmp_path)
    merged = build(None, path=str(tmp_path))
    coded = build(Int8Weights(), path=str(tmp_path))
    for name, layer in linears(coded).items():
        weight = merged.get_submodule(name).weight
        assert (layer.dense() - weight).abs().max() <= weight.abs().max() / 254


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_critic_stands_on_one(scheme):
    coded = build(scheme(), ScalarHead)
    values, whole = coded.values(TEXTS), twin(coded, ScalarHead).values(TEXTS)
    assert torch.equal(values, whole)
    values.sum().backward()
    assert all(weight.grad is not None for weight in weights_of(coded))
    assert len(weights_of(coded)) == 29  # with the head


@pytest.mark.parametrize("scheme", SCHEMES)
def test_four_roles_stand_on_one(scheme, base, prompts):
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


def test_hydra_brings_its_own_adapters(base):
    hydra = Hydra(base, quantization=Int8Weights())
    assert len(linears(hydra)) == 14


# Refusals -----------------------------------------------------------------------------------------

REFUSED = {
    "no adapter": ({"lora": None}, "nothing to train: add lora"),
    "SLTrain": ({"lora": None, "sltrain": SLTrain(rank=2)}, "quantized ones are frozen: drop one"),
    "an adapter that is merged": ({"lora": SparseLowRankAdapter(r=2)}, "take LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny(**settings, quantization=Int8Weights())


def test_blocks_of_64_must_fit():
    with pytest.raises(ValueError, match=r"a layer of \(3, 5\) does not divide"):
        NF4Weights().quantize(torch.ones(3, 5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_torchao_it_says_what_to_install(scheme, monkeypatch):
    monkeypatch.setattr(torchao_weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'torchao>=0.18'"):
        scheme()


# Ranks --------------------------------------------------------------------------------------------


def fit(folder, scheme, world, **settings):
    """The adapters after three batches of ReMax, and the bytes of the policy on this rank."""
    torch.manual_seed(0)
    algorithm = ReMax(
        policy=partial(build, scheme),
        num_samples=2,
        microbatch_tokens=40,
        optimizer=lambda params: AdamW(params, lr=1e-2),
    )
    run = trainer(folder, limit_val_batches=0, devices=world, **settings)
    run.fit(algorithm, RandomPrompts(3, 4 // world))
    held = [local(weight) for weight in algorithm.policy.parameters()]
    return [weight.float() for weight in trained(algorithm)], size(held)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "fsdp2"])
def test_two_ranks_equal_one_process(two_ranks, tmp_path, scheme, strategy):
    whole, held = fit(tmp_path, scheme(), 1)
    parts = two_ranks(partial(fit, strategy=strategy), tmp_path, scheme(), 2)
    for trained_here, _ in parts:
        assert distance(trained_here, whole) < 1e-5
    assert sum(held_here for _, held_here in parts) == held * (1 if strategy == "fsdp2" else 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_gathered_in_half_precision_are_of_the_same_base(two_ranks, tmp_path, scheme):
    """DDP casts no weights, so its base is the one that was coded."""
    runs = [
        two_ranks(partial(fit, strategy=strategy, precision="bf16-mixed"), tmp_path, scheme(), 2)
        for strategy in ("ddp_find_unused_parameters_true", "fsdp2")
    ]
    for (replicated, _), (sharded, _) in zip(*runs, strict=True):
        assert distance(sharded, replicated) < 1e-5

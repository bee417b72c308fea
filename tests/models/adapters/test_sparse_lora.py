"""LoRA with a sparse part: outputs, gradients, sizes, saving and refusals."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from tiny_models import TINY, tiny
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.algorithms.remax import ReMax
from lit_align.batches import TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.adapters.sparse_lora import SparseLoraLinear, SparseLowRankAdapter
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead

SMALL = SparseLowRankAdapter(r=2, lora_alpha=4, density=0.1)
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS, dtype=torch.bool)
TEXTS = TextBatch(tokens=IDS, token_mask=ONES, target_mask=ONES, lengths=[9, 9])


def with_random_update(network):
    """Set B and S to random values, as after training, and return the network."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name or "lora_sparse" in name:
                weight.normal_(std=0.3)
    return network


def sparse_layers(network):
    return [module for module in network.modules() if isinstance(module, SparseLoraLinear)]


def test_outputs_start_as_those_of_the_base():
    policy = tiny(lora=SMALL)
    assert torch.equal(policy.logprobs(TEXTS), tiny().logprobs(TEXTS))
    assert len(sparse_layers(policy)) == 14


def test_the_update_is_low_rank_plus_sparse_and_can_be_disabled():
    policy, base = with_random_update(tiny(lora=SMALL)), tiny()
    layer = policy.network.model.layers[0].mlp.down_proj
    inputs, weight = torch.randn(3, 64), base.network.model.layers[0].mlp.down_proj.weight
    lora_a, lora_b, value, index, scale = layer.factors("default")
    sparse = torch.zeros(32 * 64).index_put((index.long(),), value).view(32, 64)
    expected = inputs @ (weight + 2 * lora_b @ lora_a + sparse).T
    assert (len(value), scale) == (204, 2)
    torch.testing.assert_close(layer(inputs), expected)
    assert (policy.logprobs(TEXTS) - base.logprobs(TEXTS)).abs().max() > 0.1
    with policy.adapters.disable_all():
        assert torch.equal(policy.logprobs(TEXTS), base.logprobs(TEXTS))


def test_only_the_update_trains_also_after_a_pass_of_the_reference():
    policy = tiny(lora=SMALL)
    with policy.adapters.disable_all():
        policy.logprobs(TEXTS)
    policy.logprobs(TEXTS).sum().backward()
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert len(trained) == 14 * 3
    assert all("lora_" in name for name in trained)
    for layer in sparse_layers(policy):
        assert layer.lora_B["default"].weight.grad.any()
        assert layer.lora_sparse["default"].value.grad.any()


def test_number_of_parameters_and_bytes_of_positions():
    policy = tiny(lora=SMALL)
    trainable = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    shapes = 2 * ([(32, 32)] * 2 + [(16, 32)] * 2 + [(64, 32)] * 2 + [(32, 64)])
    sparse = sum(int(0.1 * out * inner) for out, inner in shapes)
    assert trainable == sum(2 * (out + inner) for out, inner in shapes) + sparse
    positions = [layer.lora_sparse["default"].index for layer in sparse_layers(policy)]
    assert sum(index.nbytes for index in positions) == 4 * sparse


def test_supports_differ_between_layers_and_are_reproducible():
    first, again = sparse_layers(tiny(lora=SMALL)), sparse_layers(tiny(lora=SMALL))
    supports = [tuple(layer.lora_sparse["default"].index.tolist()) for layer in first]
    assert len(set(supports)) == 14
    assert supports == [tuple(layer.lora_sparse["default"].index.tolist()) for layer in again]


def test_a_policy_is_saved_as_a_full_model_with_the_update_merged(tmp_path):
    policy = with_random_update(tiny(lora=SMALL))
    assert policy.saves_full_model
    policy.save(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded(IDS).logits, policy.network(IDS).logits, rtol=0, atol=1e-5)
    assert loaded.state_dict().keys() == tiny().network.state_dict().keys()
    assert not list(tmp_path.glob("adapter_*"))


def test_a_reward_model_is_saved_as_a_full_model_with_the_trained_head(tmp_path):
    torch.manual_seed(0)
    scalar = with_random_update(ScalarHead(config=dict(TINY), lora=SMALL))
    scalar.network.config.pad_token_id = 0
    (head,) = (w for n, w in scalar.named_parameters() if "score" in n and w.requires_grad)
    head.data.normal_()
    scalar.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scores = loaded(IDS).logits.squeeze(-1)
    torch.testing.assert_close(scores, scalar.scores(TEXTS), rtol=0, atol=1e-5)


def test_biases_are_saved(tmp_path):
    torch.manual_seed(0)
    policy = with_random_update(Policy(config={**TINY, "model_type": "qwen2"}, lora=SMALL))
    policy.network.model.layers[0].self_attn.q_proj.base_layer.bias.data.normal_()
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, policy.network(IDS).logits, rtol=0, atol=1e-5)


def test_peft_merges_both_parts():
    policy = with_random_update(tiny(lora=SMALL))
    expected = policy.network(IDS).logits
    assert isinstance(policy.adapted, PeftModel)
    merged = policy.adapted.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-5)


def test_a_plain_adapter_is_saved_as_an_adapter(tmp_path):
    policy = tiny(lora=LoRA(r=2))
    assert not policy.saves_full_model
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_plain_frozen_adapter_can_be_loaded_as_well(tmp_path):
    tiny().save(tmp_path / "base")
    other = Policy(str(tmp_path / "base"), lora=LoRA(r=2))
    for name, weight in other.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    other.save(tmp_path / "adapter")
    policy = with_random_update(Policy(str(tmp_path / "base"), lora=SMALL))
    before = policy.logprobs(TEXTS)
    policy.adapters.load_frozen_adapter(str(tmp_path / "adapter"), "dpo")
    with torch.no_grad(), policy.adapters.use_adapter("dpo"):
        torch.testing.assert_close(policy.logprobs(TEXTS), other.logprobs(TEXTS))
    assert torch.equal(policy.logprobs(TEXTS), before)
    policy.save(tmp_path / "full")
    loaded = Policy(str(tmp_path / "full"))
    torch.testing.assert_close(loaded.logprobs(TEXTS), before, rtol=0, atol=1e-5)


def test_the_reference_is_the_base_without_another_network(run):
    policy = partial(tiny, lora=SMALL)
    algorithm = ReMax(policy=policy, optimizer=partial(AdamW, lr=1e-2))
    metrics = run(algorithm, num_batches=1).callback_metrics
    assert float(metrics["kl/per_response_k1"]) == 0
    assert "reference" not in dict(algorithm.named_children())
    for layer in sparse_layers(algorithm.policy):
        assert layer.lora_B["default"].weight.any()
        assert layer.lora_sparse["default"].value.any()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    policy = with_random_update(tiny(lora=SMALL))
    exact = policy.logprobs(TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = policy.logprobs(TEXTS)
        mixed.sum().backward()
    assert 0 < (mixed - exact).abs().max() < 0.2
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    assert {weight.grad.dtype for weight in trained} == {torch.float32}


def test_gradients_are_finite_in_bfloat16():
    policy = with_random_update(tiny(lora=SMALL, dtype="bfloat16"))
    policy.logprobs(TEXTS).sum().backward()
    gradients = [weight.grad for weight in policy.parameters() if weight.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_unsupported_settings_are_refused():
    with pytest.raises(ValueError, match=r"density must be between 0 and 1, found 1.5"):
        SparseLowRankAdapter(density=1.5)
    with pytest.raises(ValueError, match=r"supports one role on its base\. Use LoRA"):
        SMALL.peft_config("CAUSAL_LM", None, exclude_modules=["score"])
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match=r"plain linear layers only, and transformer.h.0\S* is"):
        Policy(config=gpt2, lora=SMALL)

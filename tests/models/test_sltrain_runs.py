"""Training, saving and resuming of networks with low-rank plus sparse layers."""

import csv
from copy import deepcopy
from functools import partial

import pytest
import torch
from tiny_models import TINY, RandomTexts, distance, tiny, trained, trainer
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.sft import SFT
from lit_align.batches import TextBatch
from lit_align.cli.main import main
from lit_align.models.adapters.lora import LoRA
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.sltrain import SLTrain

SMALL = SLTrain(rank=4, alpha=2, density=0.1)
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def sltrain_policy(**settings):
    """Return a tiny policy of low-rank plus sparse layers with equal weights each time."""
    return tiny(sltrain=SMALL, **settings)


def with_random_factors(network):
    """Set every B to random values, as after training, and return the network."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return network


def adam(params):
    return AdamW(params, lr=1e-2)


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for activation_checkpointing in (False, True):
        policy = with_random_factors(
            sltrain_policy(activation_checkpointing=activation_checkpointing, dtype="float64")
        )
        policy.logprobs(texts()).sum().backward()
        gradients.append([weight.grad for weight in policy.parameters()])
    assert all(map(torch.equal, *gradients))


def texts():
    ones = torch.ones_like(IDS, dtype=torch.bool)
    return TextBatch(tokens=IDS, token_mask=ones, target_mask=ones, lengths=[9, 9])


def test_the_reference_is_the_initial_policy(run):
    algorithm = ReMax(policy=sltrain_policy, optimizer=adam)
    metrics = run(algorithm, num_batches=1).callback_metrics
    assert float(metrics["kl/per_response_k1"]) == 0
    start = sltrain_policy()
    assert all(
        map(torch.equal, algorithm.reference.state_dict().values(), start.state_dict().values())
    )
    assert distance(trained(algorithm), list(start.parameters())) > 0.01


def test_transformers_loads_the_dense_weights_of_a_policy(tmp_path):
    policy = with_random_factors(sltrain_policy())
    policy.save(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded(IDS).logits, policy.network(IDS).logits, rtol=0, atol=1e-5)
    for number, block in enumerate(policy.network.model.layers):
        weight = loaded.model.layers[number].mlp.down_proj.weight
        torch.testing.assert_close(weight, block.mlp.down_proj.dense(), rtol=0, atol=1e-6)
    assert loaded.state_dict().keys() == tiny().network.state_dict().keys()


def test_a_saved_policy_loads_as_a_plain_policy(tmp_path):
    policy = with_random_factors(sltrain_policy())
    policy.save(tmp_path)
    again = Policy(str(tmp_path), lora=LoRA(r=2))
    torch.testing.assert_close(again.logprobs(texts()), policy.logprobs(texts()), rtol=0, atol=1e-5)


def test_biases_and_tied_embeddings_are_saved(tmp_path):
    config = {**TINY, "model_type": "qwen2", "tie_word_embeddings": True}
    policy = with_random_factors(Policy(config=config, sltrain=SMALL))
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, policy.network(IDS).logits, rtol=0, atol=1e-5)


def test_transformers_loads_the_dense_weights_of_a_reward_model(tmp_path):
    torch.manual_seed(0)
    scalar = with_random_factors(ScalarHead(config=dict(TINY), sltrain=SMALL))
    assert type(scalar.network.score) is nn.Linear
    scalar.network.config.pad_token_id = 0
    scalar.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scores = loaded(IDS).logits.squeeze(-1)
    torch.testing.assert_close(scores, scalar.scores(texts()), rtol=0, atol=1e-5)


def test_half_precision_parts_are_merged_in_float32(tmp_path):
    policy = with_random_factors(sltrain_policy(dtype="bfloat16"))
    policy.save(tmp_path)
    made = policy.network.model.layers[1].mlp.up_proj
    exact = deepcopy(made).float().dense().bfloat16()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, exact)
    assert not torch.equal(made.dense(), exact)  # because it rounds twice


@pytest.mark.parametrize("config", ["sft", "reward_model"])
def test_the_overlay_trains_from_scratch_and_its_export_reloads(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    few = "--data.batch_size 32 --trainer.limit_train_batches 25 --trainer.limit_val_batches 1"
    words = f"fit --config {config} --config toy --config sltrain --model.optimizer.lr 1e-2 {few}"
    assert main([*words.split(), "--trainer.default_root_dir", "run"]) == 0
    with open("run/metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    kinds = {"sft": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    loaded, report = kinds[config].from_pretrained("run/hf", output_loading_info=True)
    assert not any(report.values())
    assert loaded.model.layers[0].mlp.up_proj.weight.shape == (168, 64)


def policy_of_seed(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(config=dict(TINY), sltrain=SMALL)


def sft(folder, seed, epochs, **more):
    """Train a policy with random weights and supports of this seed."""
    torch.manual_seed(0)
    algorithm = SFT(policy=partial(policy_of_seed, seed), microbatch_tokens=9, optimizer=adam)
    run = trainer(folder, max_epochs=epochs, limit_val_batches=0)
    run.callbacks.clear()
    run.fit(algorithm, RandomTexts(3), **more)
    return algorithm, run


def test_a_resumed_run_equals_an_uninterrupted_one_and_uses_the_saved_support(tmp_path):
    expected_run, _ = sft(tmp_path, seed=0, epochs=2)
    _, stopped = sft(tmp_path, seed=0, epochs=1)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    other, _ = sft(tmp_path, seed=1, epochs=0)
    other.configure_model()
    fresh = other.policy.network.model.layers[0].mlp.up_proj.sparse_index
    resumed, _ = sft(
        tmp_path, seed=1, epochs=2, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    expected = expected_run.policy.state_dict()
    assert not torch.equal(expected["network.model.layers.0.mlp.up_proj.sparse_index"], fresh)
    for name, value in resumed.policy.state_dict().items():
        assert torch.equal(value, expected[name]), name

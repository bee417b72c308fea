"""Sharded loading: each rank reads its own rows of the weights from the files."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from rank_equality_cases import fit_three_batches
from safetensors.torch import load_file, save_file
from tiny_models import TINY, RandomPairs, RandomPrompts, RandomTexts, distance, trainer, weights
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM

from lit_align.algorithms.dpo import DPO
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.hydra_sft import HydraSFT
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.rto import RTO
from lit_align.algorithms.sft import SFT
from lit_align.batches import TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.hydra import Hydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.weights.sharded_loading import WeightFiles
from lit_align.models.weights.torchao import Int8Weights

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
MODELS = {
    "plain": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "long rope": {**TINY, "rope_parameters": ROPE, "rope_scaling": ROPE},
    "odd sizes": {**TINY, "vocab_size": 33, "intermediate_size": 51},
    "gpt2": {**GPT2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def adam(params):
    return AdamW(params, lr=1e-2, eps=1e-5)


def sgd(params):
    return SGD(params, lr=0.1)


def saved(folder, kind, name="plain", files=1):
    """Return the path of a model with random weights, in one file or with an index."""
    place = folder / f"{kind.__name__} {name} {files}"
    if not place.is_dir():
        torch.manual_seed(0)
        kind(config=dict(MODELS[name])).save(place)
        if files > 1:
            unsharded = AutoModelForCausalLM.from_pretrained(place)
            unsharded.save_pretrained(place, max_shard_size="20KB")
            (place / "model.safetensors").unlink(missing_ok=True)
            assert len(list(place.glob("model-*.safetensors"))) >= files
    return str(place)


def dpo(folder, name="plain", files=1, **settings):
    path = saved(folder, Policy, name, files)
    return DPO(policy=lambda: Policy(path, **settings), optimizer=adam, microbatch_tokens=30)


def without_prefix(folder):
    """Return DPO on files in which names lack the prefix of the backbone."""
    path = saved(folder, Policy, "gpt2")
    weights = load_file(f"{path}/model.safetensors")
    short = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(short, f"{path}/model.safetensors", metadata={"format": "pt"})
    return DPO(policy=lambda: Policy(path), optimizer=adam)


def new_head(folder, **settings):
    path = saved(folder, Policy)
    return RewardModel(reward_model=lambda: ScalarHead(path, **settings), optimizer=adam)


def ppo(folder):
    path = saved(folder, Policy)
    return PPO(policy=lambda: Policy(path), optimizer=adam, microbatch_tokens=40)


def dpo_adapter(folder):
    """Return RTO with a frozen DPO adapter on the reference, which is the policy's base."""
    path, place = saved(folder, Policy), folder / "adapter"
    if not place.is_dir():
        torch.manual_seed(1)
        base = Policy(path, lora=LoRA(r=2, lora_alpha=64))
        for name, weight in base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        base.save(place)
    settings = {"dpo_adapter": str(place), "dpo_coef": 1.0, "microbatch_tokens": 40}
    return RTO(policy=lambda: Policy(path), optimizer=adam, **settings)


def merged_adapter(folder):
    """Return DPO on the folder of an adapter, which is merged into its base.

    The merged weights are large, so that some gradients are rounding noise. AdamW would divide it
    by its own size, SGD does not.
    """
    dpo_adapter(folder)
    return DPO(policy=lambda: Policy(str(folder / "adapter")), optimizer=sgd)


def hydra(folder):
    path = saved(folder, PolicyWithRewardHead)
    policy = partial(Hydra, path, lora=LoRA(r=2, lora_alpha=4))
    return HydraPPO(policy=policy, optimizer=adam, microbatch_tokens=40)


CASES = {
    "one file": (dpo, RandomPairs),
    "an index of files": (partial(dpo, files=3), RandomPairs),
    "tied embeddings": (partial(dpo, name="tied"), RandomPairs),
    "scaled rotary frequencies": (partial(dpo, name="long rope"), RandomPairs),
    "sizes that the number of ranks does not divide": (partial(dpo, name="odd sizes"), RandomPairs),
    "names without the backbone's prefix": (without_prefix, RandomPairs),
    "LoRA": (partial(dpo, lora=LoRA(r=2, lora_alpha=4)), RandomPairs),
    "modules_to_save with LoRA": (
        partial(dpo, lora=LoRA(r=2, lora_alpha=4, modules_to_save=["lm_head"])),
        RandomPairs,
    ),
    "a new head": (new_head, RandomPairs),
    "a new head with LoRA": (partial(new_head, lora=LoRA(r=2, lora_alpha=4)), RandomPairs),
    "a critic on the policy's backbone": (ppo, RandomPrompts),
    "a frozen adapter on the reference": (dpo_adapter, RandomPrompts),
    "a base with a merged adapter": (merged_adapter, RandomPairs),
    "Hydra": (hydra, RandomPrompts),
}


def run(folder, case, ranks):
    """Return the weights after three batches, and the fingerprint of the reference."""
    build, data = CASES[case]
    algorithm = build(folder)
    more = {"devices": ranks, "strategy": "fsdp2"} if ranks > 1 else {}
    trained, _ = fit_three_batches(folder, algorithm, data(3, 4 // ranks), **more)
    return trained, algorithm.reference_model.fingerprint if hasattr(
        algorithm, "reference"
    ) else 0.0


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_load_trains_as_a_plain_load(two_ranks, tmp_path, case):
    one, fingerprint = run(tmp_path, case, 1)
    for trained, same in two_ranks(run, tmp_path, case, 2):
        assert distance(trained, one) < 1e-5
        assert same == pytest.approx(fingerprint, rel=1e-9)


def quantized(folder):
    """Return DPO on an int8 base, which each rank quantizes from unsharded weights."""
    return dpo(folder, lora=LoRA(r=2, lora_alpha=4), quantization=Int8Weights())


def new_reward_head(folder):
    """Return HydraSFT on a language model, which gets a random reward head."""
    path = saved(folder, Policy)
    return HydraSFT(policy=lambda: PolicyWithRewardHead(path), optimizer=adam)


LOAD_CASES = {
    **CASES,
    "a new reward head on a policy": (new_reward_head, RandomPairs),
    "quantized": (quantized, RandomPairs),
}


def loaded(folder, case, ranks):
    """Return the value and requires_grad of each tensor before the first step, unsharded."""
    build, data = LOAD_CASES[case]
    algorithm, found = build(folder), {}

    def record() -> None:
        for source in (algorithm.named_parameters, algorithm.named_buffers):
            for name, tensor in source(remove_duplicate=False):
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found[name] = full.detach().clone(), tensor.requires_grad

    algorithm.on_fit_start = record
    torch.manual_seed(0)
    more = {"devices": ranks, "strategy": "fsdp2"} if ranks > 1 else {}
    fit = trainer(folder, max_steps=0, limit_val_batches=0, **more)
    fit.callbacks.clear()
    fit.fit(algorithm, data(1))
    return found


@pytest.mark.parametrize("case", LOAD_CASES)
def test_a_sharded_load_equals_a_plain_load(two_ranks, tmp_path, case):
    if case == "quantized" and find_spec("torchao") is None:
        pytest.skip("torchao makes the codes")
    plain = loaded(tmp_path, case, 1)
    for sharded in two_ranks(loaded, tmp_path, case, 2):
        assert list(sharded) == list(plain)
        for name, (tensor, trains) in plain.items():
            other: Tensor = sharded[name][0]
            assert (other.dtype, other.device) == (tensor.dtype, tensor.device), name
            assert torch.equal(other, tensor), name
            assert sharded[name][1] == trains, name


@pytest.mark.parametrize("name", MODELS)
def test_only_new_weights_and_buffers_have_memory_before_sharding(tmp_path, name):
    path = saved(tmp_path, Policy, name)
    with torch.device("meta"):
        policy = Policy(path, lora=LoRA(r=2))
        critic = ScalarHead.from_backbone(Policy(path)) if name != "gpt2" else ScalarHead(path)
    real = {n for n, weight in policy.network.named_parameters() if not weight.is_meta}
    assert all(".lora_" in n for n in real)
    assert [n for n, weight in critic.network.named_parameters() if not weight.is_meta] == [
        "score.weight"
    ]
    assert not any(buffer.is_meta for buffer in policy.network.buffers())


def logprobs_of_both_loads(folder, name):
    """Return the log-probs of a text by a sharded and by an unsharded network."""
    path = saved(folder, Policy, name)
    algorithm = SFT(policy=lambda: Policy(path))
    seen = []
    tokens = torch.arange(3, 15)[None]
    ones = torch.ones_like(tokens, dtype=torch.bool)
    text = TextBatch(tokens=tokens, token_mask=ones, target_mask=ones, lengths=[12])
    algorithm.on_fit_start = lambda: seen.append(algorithm.policy.logprobs(text).detach())
    done = trainer(folder, devices=2, strategy="fsdp2", max_steps=0)
    done.callbacks.clear()
    done.fit(algorithm, RandomTexts(1))
    return seen[0], Policy(path).logprobs(text).detach()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_an_unsharded_load(two_ranks, tmp_path, name):
    saved(tmp_path, Policy, name)
    for sharded, unsharded in two_ranks(logprobs_of_both_loads, tmp_path, name):
        torch.testing.assert_close(sharded, unsharded, rtol=0, atol=1e-6)


def weights_after_validation_and_fit(folder):
    """Return the weights of a fit that follows a validation of the same algorithm."""
    algorithm = dpo(folder)
    torch.manual_seed(0)
    done = trainer(folder, devices=2, strategy="fsdp2")
    done.callbacks.clear()
    done.validate(algorithm, RandomPairs(1, 2), verbose=False)
    done = trainer(folder, devices=2, strategy="fsdp2", limit_val_batches=0)
    done.callbacks.clear()
    done.fit(algorithm, RandomPairs(3, 2))
    return weights(algorithm.policy)


def test_a_fit_after_a_validation_trains_the_shards(two_ranks, tmp_path):
    one, _ = run(tmp_path, "one file", 1)
    for trained in two_ranks(weights_after_validation_and_fit, tmp_path):
        assert distance(trained, one) < 1e-5


def test_a_missing_weight_is_refused_before_sharding(tmp_path):
    path = saved(tmp_path, Policy)
    weights = load_file(f"{path}/model.safetensors")
    weights["model.strange.weight"] = weights.pop("model.norm.weight")
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with torch.device("meta"), pytest.raises(ValueError, match="lacks 1 weights"):
        Policy(path)


def test_read_rows_reads_a_slice_of_a_file(tmp_path):
    path = saved(tmp_path, Policy, files=3)
    files = WeightFiles.find(path, None)
    unsharded = Policy(path).network.lm_head.weight
    rows = torch.empty(4, 32)
    files.read_rows("lm_head.weight", 3, rows)
    assert torch.equal(rows, unsharded[3:7])
    assert files.file_key("base.lm_head.base_layer.weight", "base") == "lm_head.weight"
    assert files.file_key("lm_head.lora_A.default.weight", "model") is None


def test_a_plain_load_reads_all_weights_at_once(tmp_path):
    policy: Backbone = Policy(saved(tmp_path, Policy))
    assert policy.shard_state.weight_files is None
    assert not any(weight.is_meta for weight in policy.parameters())

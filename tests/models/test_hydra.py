"""Hydra: the adapter and head that each role uses, and peft's behavior on which that depends."""

import pytest
import torch
from peft import PeftModel
from tiny_models import TINY, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.batches import Experience
from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import ACTOR, CRITIC, Hydra, JointHydra
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead, values_at_last_token


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Return the folder of a two-headed model."""
    folder = tmp_path_factory.mktemp("two_headed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PolicyWithRewardHead(config=dict(TINY)).save(folder)
    return str(folder)


@pytest.fixture
def answered(prompts) -> Experience:
    """Return four prompts with responses of 4, 4, 2 and 1 tokens."""
    prompts.responses = torch.randint(3, 32, (4, 4), generator=torch.Generator().manual_seed(3))
    prompts.response_lengths = [4, 4, 2, 1]
    prompts.response_mask = torch.arange(4) < torch.tensor([4, 4, 2, 1]).unsqueeze(1)
    return prompts


def hydra(base: str, kind: type[Hydra] = Hydra, **settings) -> Hydra:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind(base, lora=LoRA(r=4, lora_alpha=8), **settings)


def perturb(network: Hydra) -> Hydra:
    """Change every adapter and the value head, and return the network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights_of(network):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return network


def weights_of(network: Hydra) -> list[nn.Parameter]:
    return [w for name in network.trained_adapters for w in network.adapter_weights(name)]


def frozen(network: Hydra) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad}


def has_gradients(network: Hydra, adapter: str) -> list[bool]:
    """Return, for each weight of an adapter, if it has a gradient other than 0."""
    return [
        w.grad is not None and bool((w.grad != 0).any()) for w in network.adapter_weights(adapter)
    ]


def gradient_norm(network: Hydra, adapter: str) -> float:
    squares = [w.grad.square().sum() for w in network.adapter_weights(adapter)]
    return float(torch.stack(squares).sum().sqrt())


# The two-headed model on disk ---------------------------------------------------------------------


def test_one_folder_holds_a_language_model_and_a_reward_model(base, answered):
    two = PolicyWithRewardHead(base)
    language = AutoModelForCausalLM.from_pretrained(base)
    reward_model = AutoModelForSequenceClassification.from_pretrained(base)
    assert torch.equal(language.lm_head.weight, two.head.weight)
    assert torch.equal(reward_model.score.weight, two.network.score.weight)
    assert torch.equal(
        ScalarHead(base).scores(answered), hydra(base).scores_and_ref_logprobs(answered)[0]
    )


def test_hydra_requires_a_trained_reward_head(tmp_path):
    tiny().save(tmp_path)
    assert PolicyWithRewardHead(str(tmp_path)).missing_weights == ["score.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is 'score.weight'"):
        Hydra(str(tmp_path))


# Network of each role -----------------------------------------------------------------------------


def test_disabled_adapters_give_the_base_bit_for_bit(base, answered):
    network, untouched = perturb(hydra(base)), PolicyWithRewardHead(base)
    with network.adapters.disable_all(), torch.no_grad():
        assert torch.equal(network.logprobs(answered), untouched.logprobs(answered))
    scores, logprobs = network.scores_and_ref_logprobs(answered)
    assert torch.equal(logprobs, untouched.logprobs(answered))
    assert torch.equal(scores, ScalarHead(base).scores(answered))
    assert not torch.equal(network.logprobs(answered), untouched.logprobs(answered))


@pytest.mark.parametrize("kind", [Hydra, JointHydra])
def test_the_critic_starts_with_the_values_of_the_reward_model(base, answered, kind):
    network, reward_model = hydra(base, kind), ScalarHead(base)
    values = reward_model.state_values(answered)
    assert torch.allclose(network.state_values(answered), values, atol=1e-5)
    assert torch.equal(network.logprobs(answered), network.scores_and_ref_logprobs(answered)[1])


def test_reward_and_value_heads_are_two_tensors(base, answered):
    network = hydra(base)
    before = network.scores_and_ref_logprobs(answered)[0]
    with torch.no_grad():
        network.network.score.modules_to_save[CRITIC].weight += 1.0
    assert torch.equal(network.scores_and_ref_logprobs(answered)[0], before)
    assert not torch.allclose(
        network.state_values(answered), ScalarHead(base).state_values(answered)
    )


def test_the_value_head_trains_and_the_reward_head_does_not(base):
    network = hydra(base)
    assert network.network.score.modules_to_save[CRITIC].weight.requires_grad
    assert not network.network.score.original_module.weight.requires_grad


def test_a_joint_pass_equals_two_separate_passes(base, answered):
    network = perturb(hydra(base, JointHydra))
    logprobs, entropy, values = network.logprobs_entropy_and_values(answered)
    assert torch.equal(values, network.state_values(answered))
    assert torch.equal(logprobs, network.logprobs(answered))
    assert torch.equal(entropy, network.logprobs_and_entropy(answered)[1])


# Switching and gradients --------------------------------------------------------------------------


def test_each_loss_reaches_only_its_own_adapter(base, answered):
    network = perturb(hydra(base))
    network.logprobs(answered).sum().backward()
    assert all(has_gradients(network, ACTOR))
    assert not any(has_gradients(network, CRITIC))
    network.zero_grad()
    network.state_values(answered).sum().backward()
    assert all(has_gradients(network, CRITIC))
    assert not any(has_gradients(network, ACTOR))
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_backward_before_each_switch_reaches_both_adapters(base, answered):
    network = perturb(hydra(base))
    network.logprobs(answered).sum().backward()
    network.state_values(answered).sum().backward()
    assert all(has_gradients(network, ACTOR))
    assert all(has_gradients(network, CRITIC))


def test_checkpointed_blocks_are_recomputed_with_the_same_adapter(base, answered):
    norms = []
    for activation_checkpointing in (False, True):
        network = perturb(hydra(base, activation_checkpointing=activation_checkpointing))
        network.logprobs(answered).sum().backward()
        network.state_values(answered).sum().backward()
        norms.append([gradient_norm(network, ACTOR), gradient_norm(network, CRITIC)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_switching_keeps_requires_grad_of_all_trained_weights(base, answered):
    """peft freezes all but the active adapter on each switch."""
    network = hydra(base)
    names = {n for n, p in network.named_parameters() if p.requires_grad}
    for use in (
        network.state_values,
        network.logprobs,
        network.scores_and_ref_logprobs,
        network.state_values,
        network.scores_and_ref_logprobs,
    ):
        use(answered)
        assert {n for n, p in network.named_parameters() if p.requires_grad} == names
    assert {len(network.adapter_weights(ACTOR)), len(network.adapter_weights(CRITIC))} == {28, 29}
    assert len(names) == 28 + 29


def test_scores_have_no_gradient_under_no_grad(base, answered):
    with torch.no_grad():
        scores, logprobs = hydra(base).scores_and_ref_logprobs(answered)
    assert not scores.requires_grad
    assert not logprobs.requires_grad


# Frozen base and dtypes ---------------------------------------------------------------------------


def test_fifty_switches_do_not_change_a_bf16_base(base, answered):
    network = perturb(hydra(base, dtype="bfloat16"))
    before, scores = frozen(network), network.scores_and_ref_logprobs(answered)[0]
    for _ in range(50):
        network.logprobs(answered)
        network.state_values(answered)
    after = frozen(network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(network.scores_and_ref_logprobs(answered)[0], scores)


def test_logprobs_are_equal_after_a_switch_to_the_critic_and_back(base, answered):
    network = perturb(hydra(base, dtype="bfloat16"))
    with torch.no_grad():
        old = network.logprobs(answered)
    network.state_values(answered)
    assert torch.equal(network.logprobs(answered).detach(), old)


def test_adapters_on_a_bf16_base_are_float32(base):
    dtypes = {w.dtype for w in hydra(base, dtype="bfloat16").adapter_weights(ACTOR)}
    assert dtypes == {torch.float32}


# Saving -------------------------------------------------------------------------------------------


def test_peft_loads_each_adapter_on_the_base(base, answered, tmp_path):
    network = perturb(hydra(base))
    network.save(tmp_path)
    actor = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "actor"
    )
    critic = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "critic"
    )
    tokens, mask = answered.tokens, answered.token_mask.long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
    with torch.no_grad():
        logits = actor(**inputs).logits[:, 4:-1].log_softmax(-1)
        own = logits.gather(-1, answered.responses.unsqueeze(-1)).squeeze(-1)
        hidden = critic.base_model.model.model(**inputs).last_hidden_state
        values = critic.base_model.model.score(hidden).squeeze(-1)
    assert torch.allclose(
        own.where(answered.response_mask, 0), network.logprobs(answered), atol=1e-5
    )
    # `logprobs` has set the actor adapter, so these are not the critic's values
    actor_values = network(lambda: network.token_scores(network.hidden_states(answered)))
    assert not torch.allclose(
        values_at_last_token(values, answered), values_at_last_token(actor_values, answered)
    )
    critics = network.state_values(answered)
    assert torch.allclose(values[:, 4:-1].where(answered.response_mask, 0), critics, atol=1e-5)


# Sizes --------------------------------------------------------------------------------------------


SHAPE = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_number_of_parameters_of_base_and_adapters():
    network = Hydra(config=dict(SHAPE), lora=LoRA(r=4, lora_alpha=8))
    assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == 133440 + 64
    assert sum(p.numel() for p in network.adapter_weights(ACTOR)) == 9856
    assert sum(p.numel() for p in network.adapter_weights(CRITIC)) == 9920


def test_static_bytes_of_five_layouts():
    """2 bytes per weight, 2 per gradient and 8 of AdamW, without heads (docs/hydra.md)."""
    base, adapter = 133440, 9856
    layouts = {
        "SFT": 12 * base,
        "PPO": 28 * base,
        "LoRA-PPO": 8 * base + 24 * adapter,
        "dynamic LoRA": 4 * base + 24 * adapter,
        "joint": 2 * base + 12 * adapter,
        "Hydra": 2 * base + 24 * adapter,
    }
    printed = [1601280, 3736320, 1304064, 770304, 385152, 503424]
    assert list(layouts.values()) == printed
    for kind, name in ((JointHydra, "joint"), (Hydra, "Hydra")):
        network = kind(config=dict(SHAPE), lora=LoRA(r=4, lora_alpha=8))
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad) - 64
        num_weights = sum(p.numel() for p in network.parameters()) - 128
        assert 2 * num_weights + 10 * trained == layouts[name]


def test_a_two_headed_model_with_an_adapter_saves_its_reward_head(base, answered, tmp_path):
    """Hydra can start from the adapter and the head that HydraSFT with LoRA saves."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        trained = PolicyWithRewardHead(base, lora=LoRA(r=2))
    names = [n for n, p in trained.network.named_parameters() if p.requires_grad]
    assert any(n.startswith("score.modules_to_save") for n in names)
    assert not any("score" in n and "lora" in n for n in names)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    trained.save(tmp_path)
    network = hydra(str(tmp_path))
    scores = values_at_last_token(
        trained(lambda: trained.token_scores(trained.hidden_states(answered))), answered
    )
    assert torch.allclose(network.scores_and_ref_logprobs(answered)[0], scores, atol=1e-5)


@pytest.mark.parametrize("kind", [Hydra, JointHydra])
def test_the_value_head_of_a_bf16_base_is_float32(base, answered, kind):
    network = hydra(base, kind, dtype="bfloat16")
    head = network.network.score.modules_to_save[network.critic_adapter].weight
    assert head.dtype == torch.float32
    assert network.network.score.original_module.weight.dtype == torch.bfloat16
    network.state_values(answered).sum().backward()
    assert head.grad is not None
    assert torch.isfinite(network.scores_and_ref_logprobs(answered)[0]).all()


def test_modules_to_save_are_refused(base):
    with pytest.raises(ValueError, match=r"lora.modules_to_save, found \['embed_tokens'\]"):
        Hydra(base, lora=LoRA(modules_to_save=["embed_tokens"]))


def test_the_roles_have_all_weights_and_share_the_base(base):
    network = hydra(base)
    roles = [
        network.role("policy", ACTOR, "language"),
        network.role("critic", CRITIC, "value"),
        network.role("reference", "off", "language"),
        network.role("reward", "off", "score"),
    ]
    listed = [id(weight) for role in roles for weight in role.weights]
    assert set(listed) == {id(weight) for weight in network.parameters()}
    shared = set(map(id, roles[2].weights))
    assert all(shared <= set(map(id, role.weights)) for role in roles)

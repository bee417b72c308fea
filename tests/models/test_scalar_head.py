"""A scalar head gives one value per token, and the score at the last real token."""

import pytest
import torch
from tiny_models import TINY
from transformers import AutoModelForSequenceClassification

from lit_align.batches import TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.reward_model import RewardNetwork


def texts(left: int = 0, right: int = 0) -> TextBatch:
    """Return texts of 6, 3 and 4 tokens with padding on the left and right."""
    lengths = [6, 3, 4]
    ids = torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    pad = torch.nn.functional.pad
    ids, mask = pad(ids.where(mask, 0), (left, right)), pad(mask, (left, right), value=False)
    return TextBatch(tokens=ids, token_mask=mask, target_mask=mask, lengths=lengths)


@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_scores_do_not_depend_on_padding(left, right):
    scalar = ScalarHead(config=dict(TINY))
    expected = scalar.scores(texts())
    torch.testing.assert_close(scalar.scores(texts(left, right)), expected, atol=1e-5, rtol=0)


def test_the_score_is_the_value_at_the_last_real_token():
    scalar = ScalarHead(config=dict(TINY))
    values, scores = scalar.values(texts()), scalar.scores(texts())
    assert scores.tolist() == [values[0, 5].item(), values[1, 2].item(), values[2, 3].item()]


def test_transformers_loads_a_saved_model_with_equal_scores(tmp_path):
    scalar = ScalarHead(config=dict(TINY))
    scalar.network.config.pad_token_id = 0
    scalar.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = texts()
    logits = loaded(input_ids=batch.tokens, attention_mask=batch.token_mask.long()).logits
    torch.testing.assert_close(logits.squeeze(-1), scalar.scores(batch))


def test_a_language_model_gets_a_new_head(tmp_path, tiny_policy):
    tiny_policy.save(tmp_path)
    scalar = ScalarHead(str(tmp_path))
    assert scalar.network.score.weight.shape == (1, 32)
    torch.testing.assert_close(
        scalar.network.base_model.embed_tokens.weight,
        tiny_policy.network.base_model.embed_tokens.weight,
    )


def test_a_policy_adapter_starts_a_critic_but_not_a_reward_model(tmp_path, tiny_policy, recwarn):
    """A critic gets a new head. A reward model needs a trained one."""
    tiny_policy.save(tmp_path / "base")
    policy = Policy(str(tmp_path / "base"), lora=LoRA(r=2))
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.fill_(0.1)
    policy.save(tmp_path / "adapter")
    critic = ScalarHead(str(tmp_path / "adapter"))
    assert critic.missing_weights == ["score.weight"]
    merged = Policy(str(tmp_path / "adapter"))
    for own, expected in zip(
        critic.network.base_model.parameters(), merged.network.base_model.parameters(), strict=True
    ):
        assert torch.equal(own, expected)
    with pytest.raises(ValueError, match=r"lacks .*'score.weight'. Use a path that has them"):
        RewardNetwork(str(tmp_path / "adapter"))
    assert not [warning for warning in recwarn if "adapter keys" in str(warning.message)]


def test_a_policy_cannot_load_a_critics_adapter(tmp_path):
    ScalarHead(config=dict(TINY)).save(tmp_path / "base")
    ScalarHead(str(tmp_path / "base"), lora=LoRA(r=2)).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"trained with a score head \(SEQ_CLS\), not"):
        Policy(str(tmp_path / "adapter"))


def test_the_head_and_the_adapter_train():
    scalar = ScalarHead(config=dict(TINY), lora=LoRA(r=2))
    trained = [name for name, weight in scalar.named_parameters() if weight.requires_grad]
    assert any("score" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    assert scalar.scores(texts()).shape == (3,)


def test_a_classifier_without_a_token_level_head_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="no token-level `score` head"):
        ScalarHead(
            config={"model_type": "bert", "vocab_size": 32, "intermediate_size": 16, **sizes}
        )


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ScalarHead(config=dict(TINY)).save(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is 'model.norm.weight'"):
        ScalarHead(str(tmp_path))


def test_blocks_are_the_transformer_blocks():
    policy = Policy(config=dict(TINY))
    assert isinstance(policy, Backbone)
    assert [type(block).__name__ for block in policy.blocks] == ["LlamaDecoderLayer"] * 2

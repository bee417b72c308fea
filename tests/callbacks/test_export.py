"""Export: folders that transformers and peft load without lit_align."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_align.batches import TextBatch
from lit_align.callbacks.export import Export
from lit_align.data.toy import toy_rows, toy_tokenizer
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead

CONFIG = {**TINY, "vocab_size": 192, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}
STOPS = [3, 5]


def export(folder, pad: str = "<pad>", **roles: Backbone) -> None:
    """Export networks as at the end of training on one rank."""
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = pad
    data = SimpleNamespace(tokenizer=tokenizer, stop_ids=STOPS)
    trainer = SimpleNamespace(
        default_root_dir=folder,
        datamodule=data,
        is_global_zero=True,
        strategy=SimpleNamespace(barrier=lambda name: None),
    )
    Export().on_train_end(trainer, SimpleNamespace(roles=roles))


def policy(**settings) -> Policy:
    torch.manual_seed(0)
    return Policy(**settings) if "path" in settings else Policy(config=dict(CONFIG), **settings)


@torch.no_grad()
def change_weights(model: Backbone) -> None:
    """Change the trainable weights, in the place of training."""
    for weight in model.parameters():
        weight.add_(0.1 if weight.requires_grad else 0.0)


def texts() -> list[str]:
    """Return two reviews of different lengths, each with its stop."""
    rows = toy_rows("test")[:2]
    return [f"{row['prompt']} {row['completion']} </s>" for row in rows]


def encoded(folder) -> dict[str, torch.Tensor]:
    """Return the texts, padded by the exported tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(texts(), return_tensors="pt", padding=True, padding_side="right")
    assert found["input_ids"].shape[0] == 2
    assert not found["attention_mask"].bool().all()
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits(model, folder) -> torch.Tensor:
    return model.eval()(**encoded(folder)).logits


def test_exported_policy_has_equal_logits_tokenizer_and_stops(tmp_path):
    trained = policy()
    export(tmp_path, policy=trained)
    folder = tmp_path / "hf"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded, folder), logits(trained.network, folder))
    assert AutoTokenizer.from_pretrained(folder)(texts()[0]) == toy_tokenizer()(texts()[0])
    assert loaded.generation_config.eos_token_id == [3, 5]
    assert loaded.generation_config.pad_token_id == toy_tokenizer().pad_token_id == 0
    assert "lit_align" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])  # a pad token that is a stop is replaced
def test_exported_reward_model_is_classifier_with_equal_scores(tmp_path, pad):
    torch.manual_seed(0)
    trained = ScalarHead(config=dict(CONFIG))
    export(tmp_path, pad, reward_model=trained)
    folder = tmp_path / "hf"
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    found = encoded(folder)
    ones = found["attention_mask"].bool()
    lengths = ones.sum(-1).tolist()
    batch = TextBatch(tokens=found["input_ids"], token_mask=ones, target_mask=ones, lengths=lengths)
    with torch.no_grad():
        scores = trained.scores(batch)
    torch.testing.assert_close(logits(loaded, folder).squeeze(-1), scores)
    assert loaded.config.num_labels == 1


def test_exported_adapter_loads_on_its_base(tmp_path):
    export(tmp_path / "base", policy=policy())
    trained = policy(path=str(tmp_path / "base" / "hf"), lora=LoRA(r=2, lora_alpha=4))
    change_weights(trained)
    export(tmp_path / "lora", policy=trained)
    folder = tmp_path / "lora" / "hf"
    assert not (folder / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, folder), logits(trained.network, folder))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "hf")
    assert not torch.equal(logits(plain, folder), logits(loaded, folder))


def test_full_model_replaces_adapter_of_earlier_run(tmp_path):
    adapted, trained = policy(lora=LoRA(r=2, lora_alpha=4)), policy()
    change_weights(adapted)
    export(tmp_path, policy=adapted)
    export(tmp_path, policy=trained)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(loaded, tmp_path / "hf"), logits(trained.network, tmp_path / "hf"))


def test_adapter_replaces_full_model_of_earlier_run(tmp_path):
    export(tmp_path / "base", policy=policy())
    other = policy()
    change_weights(other)
    export(tmp_path / "lora", policy=other)
    trained = policy(path=str(tmp_path / "base" / "hf"), lora=LoRA(r=2, lora_alpha=4))
    change_weights(trained)
    folder = tmp_path / "lora" / "hf"
    export(tmp_path / "lora", policy=trained)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, folder), logits(trained.network, folder))


def test_adapter_can_share_folder_with_its_base(tmp_path):
    folder = tmp_path / "hf"
    export(tmp_path, policy=policy())
    trained = policy(path=str(folder), lora=LoRA(r=2, lora_alpha=4))
    change_weights(trained)
    export(tmp_path, policy=trained)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, folder), logits(trained.network, folder))


def test_each_role_has_a_folder(tmp_path):
    export(tmp_path, policy=policy(), critic=ScalarHead(config=dict(CONFIG)))
    for role, kind in (
        ("policy", "LlamaForCausalLM"),
        ("critic", "LlamaForSequenceClassification"),
    ):
        assert kind in (tmp_path / "hf" / role / "config.json").read_text()
        assert (tmp_path / "hf" / role / "tokenizer.json").exists()


@pytest.mark.parametrize("main", [True, False])
def test_only_first_rank_writes(tmp_path, main):
    policy().save(tmp_path / "hf", is_main_process=main)
    assert (tmp_path / "hf").exists() == main

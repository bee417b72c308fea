"""Adapter switching registers no module and adds no name to a state dict."""

from copy import deepcopy

import pytest
import torch
from tiny_models import adapted, tiny

from lit_align.batches import TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.scalar_head import ScalarHead

KINDS = [Policy, ScalarHead, PolicyWithRewardHead, Hydra, JointHydra]


def expected_names(model: Backbone) -> list[str]:
    """Return the network's names, then the same names in peft's wrapper."""
    own = list(model.network.state_dict())
    prefixes = ["network", *(["adapted.base_model.model"] if model.adapted is not None else [])]
    return [f"{prefix}.{name}" for prefix in prefixes for name in own]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_has_the_names_of_network_and_peft(kind):
    model = adapted(kind)
    assert list(model.state_dict()) == expected_names(model)
    assert len(model.state_dict()) == 2 * len(model.network.state_dict())
    assert [name for name, _ in model.named_parameters()] == [
        f"network.{name}" for name, _ in model.network.named_parameters()
    ]


def test_a_frozen_adapter_has_the_names_of_peft(tmp_path):
    base = str(tmp_path / "base")
    tiny().save(tmp_path / "base")
    Policy(base, lora=LoRA(r=2)).save(tmp_path / "adapter")
    model = Policy(base)
    assert list(model.state_dict()) == expected_names(model)
    model.adapters.load_frozen_adapter(str(tmp_path / "adapter"), "dpo")
    assert list(model.state_dict()) == expected_names(model)
    assert any(".lora_A.dpo." in name for name in model.state_dict())
    assert not any(w.requires_grad for n, w in model.named_parameters() if ".lora_" in n)


def test_a_copy_switches_its_own_adapters():
    model = tiny(lora=LoRA(r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    ids = torch.arange(3, 9)[None]
    ones = torch.ones_like(ids, dtype=torch.bool)
    text = TextBatch(tokens=ids, token_mask=ones, target_mask=ones, lengths=[6])
    copy = deepcopy(model)
    with copy.adapters.disable_all(), torch.no_grad():
        assert not torch.equal(model.logprobs(text), copy.logprobs(text))
    with torch.no_grad():
        assert torch.equal(model.logprobs(text), copy.logprobs(text))

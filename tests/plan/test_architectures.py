"""Built-in architectures have the published number of parameters."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align.plan.architectures import architecture_config, builtin_architectures


@pytest.mark.parametrize("name", builtin_architectures())
def test_architecture_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(architecture_config(f"shape:{name}"))
    assert (
        sum(weight.numel() for weight in network.parameters())
        == builtin_architectures()[name]["parameters"]
    )


def test_hub_id_of_a_builtin_architecture_needs_no_download():
    assert architecture_config("meta-llama/Llama-2-7b-hf").hidden_size == 4096

"""Built-in architectures have as many parameters as was published."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align.plan.architectures import architecture_config, builtin_architectures


@pytest.mark.parametrize("name", builtin_architectures())
def test_a_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(architecture_config(f"shape:{name}"))
    assert (
        sum(weight.numel() for weight in network.parameters())
        == builtin_architectures()[name]["parameters"]
    )


def test_a_hub_id_of_a_shape_needs_no_network():
    assert architecture_config("meta-llama/Llama-2-7b-hf").hidden_size == 4096

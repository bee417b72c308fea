"""Built-in architectures have as many parameters as was published."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align.plan.architectures import config_of, shapes


@pytest.mark.parametrize("name", shapes())
def test_a_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config_of(f"shape:{name}"))
    assert sum(weight.numel() for weight in network.parameters()) == shapes()[name]["parameters"]


def test_a_hub_id_of_a_shape_needs_no_network():
    assert config_of("meta-llama/Llama-2-7b-hf").hidden_size == 4096

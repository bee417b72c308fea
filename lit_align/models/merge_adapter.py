"""Merge an adapter into a copy of its base, in float32."""

from copy import deepcopy

import torch
from transformers import PreTrainedModel

from lit_align.models.backbone import Backbone
from lit_align.models.weights.quantization import QuantizedLinear


def merge_adapter(network: Backbone, adapter: str) -> PreTrainedModel:
    """Return a plain network that computes what `network` computes with this adapter active.

    W + scale B A is computed in float32, or in the weights' own type if that is more exact, and
    rounded once. Quantized weights are dequantized before. `network` is not changed, because its
    base may serve other roles.

    Args:
        network: Unsharded network with adapters.
        adapter: Name of one of its adapters.
    """
    # peft merges `modules_to_save` of the active adapter, not of the one in `adapter_names`
    # (peft 0.21)
    network.adapters.set_adapter(adapter)
    adapted = network.adapted
    assert adapted is not None
    dtype = network.network.dtype
    copy = deepcopy(adapted).to(torch.promote_types(dtype, torch.float32))
    for name, layer in list(copy.named_modules()):
        if isinstance(layer, QuantizedLinear):
            copy.set_submodule(name, layer.to_linear())
    plain: PreTrainedModel = copy.merge_and_unload(adapter_names=[adapter])
    return plain.to(dtype)

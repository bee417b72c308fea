"""Adapters written into the weights that they change, in float32 and in a copy."""

from copy import deepcopy

import torch
from transformers import PreTrainedModel

from lit_align.models.backbone import Backbone
from lit_align.models.weights.quantization import QuantizedLinear


def merge_adapter(network: Backbone, adapter: str) -> PreTrainedModel:
    """A plain network that computes what the adapted one does with this adapter on.

    W + scale B A is computed in float32 (or in the weights' own type, if that is finer) and rounded
    once; where W is quantized, of what its codes stand for. The network itself, whose base may
    serve other roles, stays as it is.

    Args:
        network: Whole and adapted.
        adapter: One of those that it has.
    """
    network.adapters.set_adapter(
        adapter
    )  # peft takes the fully trained layers of the adapter that is on
    adapted = network.adapted
    assert adapted is not None
    dtype = network.network.dtype
    copy = deepcopy(adapted).to(torch.promote_types(dtype, torch.float32))
    for name, layer in list(copy.named_modules()):
        if isinstance(layer, QuantizedLinear):
            copy.set_submodule(name, layer.to_linear())
    plain: PreTrainedModel = copy.merge_and_unload(adapter_names=[adapter])
    return plain.to(dtype)

"""A frozen base with a low-rank and a sparse update: ours, not the method of SLTrain's paper."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.errors import UserError
from lit_align.functional.sparse_low_rank import (
    dense_weight,
    draw_support,
    num_sparse,
    sparse_low_rank,
)
from lit_align.models.adapters.lora import LoRA
from lit_align.models.sltrain import rank_zero_seed


class SparseLowRankAdapter(LoRA):
    """LoRA plus a sparse update on a fixed random support, for pretrained weights.

    W = W0 + scale B A + S, where W0 is frozen and B and S start at zero: without the update the
    network is its own reference. This is not the method of arXiv:2406.02214, which trains from
    random weights (`SLTrain`). Saved is the whole model with the update in its weights, since
    plain peft would load an adapter's folder without the sparse part.

    Args:
        density: Share of a weight's entries that the sparse part holds.
    """

    def __init__(self, density: float = 0.01, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= density <= 1:
            raise UserError(f"density must be from 0 to 1, found {density}.")
        self.density = density

    def apply_to(self, network: PreTrainedModel, task_type: str) -> PeftModel:
        """Puts the adapter into `network` itself; every rank must call it.

        Args:
            network: The base; frozen from now on.
            task_type: peft's name of what the network does: CAUSAL_LM or SEQ_CLS.
        """
        adapted = super().apply_to(network, task_type)
        for name, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and not isinstance(layer, SparseLoraLinear):
                raise UserError(
                    f"SparseLowRankAdapter adapts plain linear layers, and {name} is none: name "
                    f"others as target_modules, or take LoRA."
                )
        return adapted

    def peft_config(
        self,
        task_type: str,
        modules_to_save: list[str] | None,
        exclude_modules: list[str] | None = None,
    ) -> LoraConfig:
        """What peft is told.

        Args:
            task_type: peft's name of what the network does.
            modules_to_save: Names of layers that are trained whole.
            exclude_modules: Names of layers that get no adapter.
        """
        if exclude_modules:
            raise UserError(
                "SparseLowRankAdapter is for one role on its base: take LoRA for several."
            )
        settings = super().peft_config(task_type, modules_to_save)
        layer = partial(SparseLoraLinear, density=self.density, seed=rank_zero_seed())
        # peft documents this method in its guide on custom models, as subject to change (peft 0.21)
        settings._register_custom_module({nn.Linear: layer})
        return settings


class SparseUpdate(nn.Module):
    """S of a layer's update.

    Args:
        layer: Gives the weight's size.
        density: Share of the weight's entries.
        seed: Of the support.
    """

    index: Tensor  # [nnz] row * in + column, ascending

    def __init__(self, layer: nn.Linear, density: float, seed: int):
        super().__init__()
        rows, columns = layer.out_features, layer.in_features
        self.value = nn.Parameter(torch.zeros(num_sparse(rows, columns, density)))
        self.register_buffer("index", draw_support(self.value.detach(), rows * columns, seed))


class SparseLoraLinear(Linear):
    """peft's LoRA layer with a part more, which peft switches and freezes along with the others."""

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_sparse")

    def update_layer(
        self, adapter_name: str, *args: Any, density: float = 0.0, seed: int = 0, **kwargs: Any
    ) -> None:
        """Adds an adapter; peft's constructor passes on what it does not know itself.

        Args:
            adapter_name: peft's.
            density: Share of the weight's entries that the sparse part holds; a plain LoRA that
                joins later has none.
            seed: Of all supports; each layer's follows from it and its name.
        """
        if not hasattr(self, "lora_sparse"):
            self.lora_sparse = nn.ModuleDict()
        own = random.Random(f"{seed} {kwargs['target_name']}").getrandbits(63)
        self.lora_sparse[adapter_name] = SparseUpdate(self.get_base_layer(), density, own)
        super().update_layer(adapter_name, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[.., in] -> [.., out]; keeps nothing dense of the update."""
        if self.disable_adapters or self.merged:
            outputs: Tensor = super().forward(x, *args, **kwargs)
            return outputs
        outputs = self.base_layer(x)
        for adapter in self.active_adapters:
            outputs = outputs + sparse_low_rank(x, *self.factors(adapter))
        return outputs

    def get_delta_weight(self, adapter: str) -> Tensor:
        """[out, in] the update that peft merges."""
        return dense_weight(*self.factors(adapter))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """A, B, the values of S, their positions, and the scale."""
        sparse = self.lora_sparse[adapter]
        assert isinstance(sparse, SparseUpdate)
        low_rank = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return *low_rank, sparse.value, sparse.index, self.scaling[adapter]


def has_sparse_adapter(network: nn.Module) -> bool:
    """Whether a network's adapter is one that plain peft cannot load."""
    return any(isinstance(layer, SparseLoraLinear) for layer in network.modules())


def merge_sparse_update(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain network that one with such an adapter stands for.

    Args:
        network: Has the layers.
        state: Its whole weights, by name.
    """
    if not has_sparse_adapter(network):
        return dict(state)
    plain = dict(state)
    for name, layer in network.named_modules():
        if isinstance(layer, SparseLoraLinear):
            lora_a = plain.pop(f"{name}.lora_A.default.weight")
            exact = torch.promote_types(lora_a.dtype, torch.float32)
            weight = dense_weight(
                lora_a.to(exact),
                plain.pop(f"{name}.lora_B.default.weight").to(exact),
                plain.pop(f"{name}.lora_sparse.default.value"),
                plain.pop(f"{name}.lora_sparse.default.index"),
                layer.scaling["default"],
            )
            base = plain[f"{name}.base_layer.weight"]
            plain[f"{name}.base_layer.weight"] = (base + weight).to(base.dtype)
    return {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): weight
        for name, weight in plain.items()
        if ".original_module." not in name and ".lora_" not in name
    }

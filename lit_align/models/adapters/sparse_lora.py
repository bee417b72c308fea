"""LoRA with an added sparse update. It is not a published method; see `sltrain.py` for that."""

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

    W = W0 + scale B A + S, where W0 is frozen and B and S start at zero. With the update disabled
    the network is its own reference model. `SLTrain` (arXiv:2406.02214) trains from random weights
    instead. The full model is saved, with the update merged, because peft would load an adapter's
    folder without the sparse part.

    Args:
        density: Fraction of a weight's entries in the sparse part.
    """

    def __init__(self, density: float = 0.01, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= density <= 1:
            raise UserError(f"density must be between 0 and 1, found {density}. Set lora.density.")
        self.density = density

    def apply_to(self, network: PreTrainedModel, task_type: str) -> PeftModel:
        """Add the adapter to a network in place. Every rank must call it.

        Args:
            network: Base, which is frozen.
            task_type: peft's name of the task: CAUSAL_LM or SEQ_CLS.
        """
        adapted = super().apply_to(network, task_type)
        for name, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and not isinstance(layer, SparseLoraLinear):
                raise UserError(
                    f"SparseLowRankAdapter adapts plain linear layers only, and {name} is "
                    f"another layer. Set lora.target_modules, or use LoRA."
                )
        return adapted

    def peft_config(
        self,
        task_type: str,
        modules_to_save: list[str] | None,
        exclude_modules: list[str] | None = None,
    ) -> LoraConfig:
        """Return peft's configuration of the adapter, with `SparseLoraLinear` as its layer.

        Args:
            task_type: peft's name of the task.
            modules_to_save: Names of layers that train fully.
            exclude_modules: Not supported.
        """
        if exclude_modules:
            raise UserError("SparseLowRankAdapter supports one role on its base. Use LoRA.")
        settings = super().peft_config(task_type, modules_to_save)
        layer = partial(SparseLoraLinear, density=self.density, seed=rank_zero_seed())
        # private, but documented in peft's guide on custom models (peft 0.21)
        settings._register_custom_module({nn.Linear: layer})
        return settings


class SparseUpdate(nn.Module):
    """The sparse part S of a layer's update, zero at the start.

    Args:
        layer: Layer with a weight of the size of S.
        density: Fraction of the weight's entries in S.
        seed: Seed of the support.

    Example:
        >>> update = SparseUpdate(nn.Linear(4, 6), density=0.5, seed=0)
        >>> update.value.shape, len(set(update.index.tolist()))
        (torch.Size([12]), 12)
    """

    index: Tensor  # [nnz] row * in + column, ascending

    def __init__(self, layer: nn.Linear, density: float, seed: int):
        super().__init__()
        rows, columns = layer.out_features, layer.in_features
        self.value = nn.Parameter(torch.zeros(num_sparse(rows, columns, density)))
        self.register_buffer("index", draw_support(self.value.detach(), rows * columns, seed))


class SparseLoraLinear(Linear):
    """peft's LoRA layer with a sparse part, which peft activates and freezes with the others."""

    # peft sets requires_grad of the modules that are listed here (peft 0.21)
    adapter_layer_names = (*Linear.adapter_layer_names, "lora_sparse")

    def update_layer(
        self, adapter_name: str, *args: Any, density: float = 0.0, seed: int = 0, **kwargs: Any
    ) -> None:
        """Add an adapter. peft's constructor passes unknown arguments on to this method.

        Args:
            adapter_name: peft's name of the adapter.
            *args: Arguments of peft's method.
            density: Fraction of the weight's entries in the sparse part. Default: 0, as for a
                plain LoRA adapter that is loaded later.
            seed: Seed of all supports. A layer's own seed is drawn from it and the layer's name.
            **kwargs: Arguments of peft's method, `target_name` among them.
        """
        if not hasattr(self, "lora_sparse"):
            self.lora_sparse = nn.ModuleDict()
        own = random.Random(f"{seed} {kwargs['target_name']}").getrandbits(63)
        self.lora_sparse[adapter_name] = SparseUpdate(self.get_base_layer(), density, own)
        super().update_layer(adapter_name, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the outputs [.., out]. The dense update is not kept for backward.

        Args:
            x: [.., in].
            *args: Arguments of peft's method.
            **kwargs: Arguments of peft's method.
        """
        if self.disable_adapters or self.merged:
            outputs: Tensor = super().forward(x, *args, **kwargs)
            return outputs
        outputs = self.base_layer(x)
        for adapter in self.active_adapters:
            outputs = outputs + sparse_low_rank(x, *self.factors(adapter))
        return outputs

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update [out, in], which peft merges.

        Args:
            adapter: Name of the adapter.
        """
        return dense_weight(*self.factors(adapter))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return A [r, in], B [out, r], S's values [nnz] and positions [nnz], and the scale.

        Args:
            adapter: Name of the adapter.
        """
        sparse = self.lora_sparse[adapter]
        assert isinstance(sparse, SparseUpdate)
        low_rank = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return *low_rank, sparse.value, sparse.index, self.scaling[adapter]


def has_sparse_adapter(network: nn.Module) -> bool:
    """Return True if a network has an adapter with a sparse part, which peft cannot load.

    Args:
        network: Network with or without adapters.

    Example:
        >>> has_sparse_adapter(nn.Linear(2, 2))
        False
    """
    return any(isinstance(layer, SparseLoraLinear) for layer in network.modules())


def merge_sparse_update(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the base with the low-rank and sparse update merged.

    Args:
        network: Network, with or without a `SparseLowRankAdapter`.
        state: Its unsharded weights by name.
    """
    if not has_sparse_adapter(network):
        return dict(state)
    plain = dict(state)
    for name, layer in network.named_modules():
        if isinstance(layer, SparseLoraLinear):
            lora_a = plain.pop(f"{name}.lora_A.default.weight")
            # half precision would round the product, the sum and the merged weight
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

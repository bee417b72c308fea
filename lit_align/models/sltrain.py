"""SLTrain: weights that are low-rank plus sparse from the first step on (arXiv:2406.02214)."""

import random
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from lit_align.errors import UserError
from lit_align.functional.sparse_low_rank import (
    dense_weight,
    draw_support,
    num_sparse,
    sparse_low_rank,
)

STATE_DICT_PARTS = ("lora_A", "lora_B", "sparse_value", "sparse_index")


class SparseLowRankLinear(nn.Module):
    """A linear layer of weight W = scale B A + S, where S lives on a fixed random support.

    B starts at zero, so W starts as S. W is dense for one product at a time, and never kept.

    Args:
        in_features: Width of the inputs.
        out_features: Width of the outputs.
        rank: Rows of A and columns of B.
        density: Share of the weight's entries that S holds.
        alpha: scale = alpha / rank.
        bias: Whether a bias is added.
        seed: Of the support; by default it is drawn from torch's generator, like the weights.
    """

    sparse_index: Tensor  # [nnz] row * in + column, ascending

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        alpha: float,
        bias: bool = False,
        seed: int | None = None,
    ):
        super().__init__()
        if rank < 1 or not 0 <= density <= 1:
            raise UserError(
                f"A sparse plus low-rank layer needs a rank of at least 1 and a density from 0 to "
                f"1, found {rank} and {density}."
            )
        self.in_features, self.out_features, self.scale = in_features, out_features, alpha / rank
        bound = in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        number = num_sparse(out_features, in_features, density)
        self.sparse_value = nn.Parameter(torch.empty(number).uniform_(-bound, bound))
        support = draw_support(self.sparse_value.detach(), out_features * in_features, seed)
        self.register_buffer("sparse_index", support)
        shift = torch.empty(out_features).uniform_(-(out_features**-0.5), out_features**-0.5)
        self.bias = nn.Parameter(shift) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[.., in] -> [.., out], in the inputs' dtype or autocast's."""
        outputs = sparse_low_rank(
            inputs, self.lora_A, self.lora_B, self.sparse_value, self.sparse_index, self.scale
        )
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def dense(self) -> Tensor:
        """[out, in] the weight; gradients flow to its parts."""
        return dense_weight(
            self.lora_A, self.lora_B, self.sparse_value, self.sparse_index, self.scale
        )


class SLTrain:
    """Trains linear layers of the blocks as low-rank plus sparse matrices, from random weights.

    Embeddings, norms and heads stay as they are, and so does a layer whose factors would hold no
    fewer numbers than its weight. Exported weights are dense.

    Args:
        rank: Columns of each low-rank factor.
        alpha: The low-rank part is scaled by alpha / rank: change both together.
        density: Share of a weight's entries that the sparse part holds.
        targets: A layer is replaced whose name within its block holds one of these.
    """

    def __init__(
        self,
        rank: int = 128,
        alpha: float = 32.0,
        density: float = 0.03,
        targets: Sequence[str] = ("attn", "attention", "mlp"),
    ):
        self.rank, self.alpha, self.density, self.targets = rank, alpha, density, tuple(targets)

    def check_compatible(self, path: str | None) -> None:
        """Refuses a network that has learnt already.

        Args:
            path: Of its weights.
        """
        if path is not None:
            raise UserError(
                f"SLTrain trains from random weights and would throw those of {path} away: give a "
                f"config and `path: null`, or adapt them with lora."
            )

    def replace_linears(self, blocks: Sequence[nn.Module]) -> None:
        """Replaces the linear layers of the blocks, in place; every rank must call it.

        Args:
            blocks: Transformer blocks with random weights, which are lost.
        """
        if not all(weight.requires_grad for block in blocks for weight in block.parameters()):
            raise UserError("SLTrain trains all weights of a block, and an adapter freezes them.")
        seed, replaced, dense = rank_zero_seed(), 0, []
        for number, block in enumerate(blocks):
            for name, layer in list(block.named_modules()):
                if not isinstance(layer, nn.Linear) or not self.is_targeted(name):
                    continue
                if not saves_memory(layer.in_features, layer.out_features, self.rank, self.density):
                    dense.append(name)
                    continue
                block.set_submodule(name, self.factorize(layer, f"{seed} {number} {name}"))
                replaced += 1
        if not replaced:
            raise UserError(self.nothing_replaced_message(dense))
        if dense:
            warnings.warn(
                f"SLTrain leaves {len(dense)} of {len(dense) + replaced} layers dense, such as "
                f"{dense[0]}: at rank {self.rank} their factors would hold no fewer numbers.",
                stacklevel=2,
            )

    def is_targeted(self, name: str) -> bool:
        """Whether a layer of that name is replaced."""
        return any(target in name for target in self.targets)

    def factorize(self, layer: nn.Linear, support: str) -> SparseLowRankLinear:
        """A new layer in the place of another.

        Args:
            layer: Gives sizes, dtype and device.
            support: Names the support: other names, other positions.
        """
        new = SparseLowRankLinear(
            layer.in_features,
            layer.out_features,
            self.rank,
            self.density,
            self.alpha,
            bias=layer.bias is not None,
            seed=random.Random(support).getrandbits(63),
        )
        return new.to(layer.weight.device, layer.weight.dtype)

    def nothing_replaced_message(self, dense: Sequence[str]) -> str:
        """Why nothing was replaced."""
        if dense:
            return (
                f"SLTrain at rank {self.rank} and density {self.density} would hold no fewer "
                f"numbers than any of the {len(dense)} layers it is for: take a lower rank."
            )
        return f"The blocks have no linear layer whose name holds one of {', '.join(self.targets)}."


def saves_memory(in_features: int, out_features: int, rank: int, density: float) -> bool:
    """Whether the factors of a weight hold fewer numbers than the weight itself."""
    low_rank = (out_features + in_features) * rank
    sparse = num_sparse(out_features, in_features, density)
    return low_rank + sparse < out_features * in_features


def densify_state_dict(network: nn.Module, state: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict with each layer's parts put together to the plain weight they stand for.

    Args:
        network: Has the layers.
        state: Its whole weights, by name.
    """
    dense = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, layer in network.named_modules():
        if isinstance(layer, SparseLowRankLinear):
            lora_a, lora_b, value, index = (
                dense.pop(f"{name}.{part}") for part in STATE_DICT_PARTS
            )
            exact = torch.promote_types(value.dtype, torch.float32)  # halves would round twice
            weight = dense_weight(lora_a.to(exact), lora_b.to(exact), value, index, layer.scale)
            dense[f"{name}.weight"] = weight.to(value.dtype)
    return dense


def rank_zero_seed() -> int:
    """torch's seed on the first rank: ranks with other supports would be other models."""
    seeds = [torch.initial_seed()]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(seeds)
    return seeds[0]

"""SLTrain: pretraining with low-rank plus sparse weights (arXiv:2406.02214)."""

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
    """A linear layer of weight W = scale B A + S, with S on a fixed random support.

    B starts at zero, so W starts as S. The dense W exists for one product at a time and is not
    kept for backward.

    Args:
        in_features: Width of the inputs.
        out_features: Width of the outputs.
        rank: Rows of A and columns of B.
        density: Fraction of the weight's entries in S.
        alpha: Numerator of scale = alpha / rank.
        bias: Add a bias.
        seed: Seed of the support. Default: drawn from torch's generator, as the weights are.

    Example:
        >>> layer = SparseLowRankLinear(4, 6, rank=2, density=0.25, alpha=4)
        >>> layer.lora_A.shape, layer.lora_B.shape, len(layer.sparse_value), layer.scale
        (torch.Size([2, 4]), torch.Size([6, 2]), 6, 2.0)
        >>> layer.dense().count_nonzero()
        tensor(6)
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
                f"rank must be at least 1 and density between 0 and 1, found {rank} and {density}. "
                f"Set sltrain.rank and sltrain.density."
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
        """Return the outputs [.., out], in the inputs' dtype or autocast's.

        Args:
            inputs: [.., in].
        """
        outputs = sparse_low_rank(
            inputs, self.lora_A, self.lora_B, self.sparse_value, self.sparse_index, self.scale
        )
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def dense(self) -> Tensor:
        """Return the dense weight [out, in]. Its gradients flow to A, B and S."""
        return dense_weight(
            self.lora_A, self.lora_B, self.sparse_value, self.sparse_index, self.scale
        )


class SLTrain:
    """Settings of SLTrain: linear layers of the blocks become low-rank plus sparse.

    Embeddings, norms and heads are not replaced, nor is a layer if its factors would have no fewer
    numbers than its weight. Exported weights are dense. Use it with random weights only.

    Args:
        rank: Columns of each low-rank factor.
        alpha: Numerator of the low-rank part's scale, alpha / rank. Change both together.
        density: Fraction of a weight's entries in the sparse part.
        targets: Parts of the names, within a block, of the layers to replace.

    Example:
        >>> SLTrain().is_targeted("mlp.up_proj"), SLTrain().is_targeted("input_layernorm")
        (True, False)
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
        """Raise a `UserError` if the network has pretrained weights.

        Args:
            path: Hub id or folder of the weights; None if they are random.
        """
        if path is not None:
            raise UserError(
                f"SLTrain trains from random weights and would discard the weights of {path}. "
                f"Set config and `path: null`, or use lora instead of sltrain."
            )

    def replace_linears(self, blocks: Sequence[nn.Module]) -> None:
        """Replace the linear layers of the blocks in place. Every rank must call it.

        Args:
            blocks: Transformer blocks. The weights of replaced layers are discarded.
        """
        if not all(weight.requires_grad for block in blocks for weight in block.parameters()):
            raise UserError(
                "sltrain and lora cannot be combined: SLTrain trains all weights of a block, and "
                "an adapter freezes them. Remove one."
            )
        seed, replaced, dense = rank_zero_seed(), 0, []
        for number, block in enumerate(blocks):
            for name, layer in list(block.named_modules()):
                if not isinstance(layer, nn.Linear) or not self.is_targeted(name):
                    continue
                if not saves_memory(layer.in_features, layer.out_features, self.rank, self.density):
                    dense.append(name)
                    continue
                # the support depends on the layer's name, not on how many layers precede it
                block.set_submodule(name, self.factorize(layer, f"{seed} {number} {name}"))
                replaced += 1
        if not replaced:
            raise UserError(self.nothing_replaced_message(dense))
        if dense:
            warnings.warn(
                f"SLTrain keeps {len(dense)} of {len(dense) + replaced} layers dense, such as "
                f"{dense[0]}: at rank {self.rank} their factors would not be smaller.",
                stacklevel=2,
            )

    def is_targeted(self, name: str) -> bool:
        """Return True if a layer is to be replaced.

        Args:
            name: Name of the layer within its block.
        """
        return any(target in name for target in self.targets)

    def factorize(self, layer: nn.Linear, support: str) -> SparseLowRankLinear:
        """Return a low-rank plus sparse layer with new weights, of the sizes of another layer.

        Args:
            layer: Layer with the sizes, bias, dtype and device to use.
            support: Text from which the positions of the sparse part are drawn.
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
        """Return the error message for a network of which no layer was replaced.

        Args:
            dense: Names of the targeted layers, which stayed dense.
        """
        if dense:
            return (
                f"SLTrain at rank {self.rank} and density {self.density} would make none of the "
                f"{len(dense)} targeted layers smaller. Set a lower sltrain.rank."
            )
        return (
            f"The blocks have no linear layer with one of {', '.join(self.targets)} in its name. "
            f"Set sltrain.targets."
        )


def saves_memory(in_features: int, out_features: int, rank: int, density: float) -> bool:
    """Return True if the parts of a weight have fewer numbers than the weight itself.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        rank: Columns of each low-rank factor.
        density: Fraction of the weight's entries in the sparse part.

    Example:
        (8 + 8) * 3 + 0.125 * 64 = 56 numbers replace 64.

        >>> saves_memory(8, 8, rank=3, density=0.125), saves_memory(8, 8, rank=4, density=0.0)
        (True, False)
    """
    low_rank = (out_features + in_features) * rank
    sparse = num_sparse(out_features, in_features, density)
    return low_rank + sparse < out_features * in_features


def densify_state_dict(network: nn.Module, state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return a state dict with dense weights [out, in] instead of low-rank and sparse parts.

    Args:
        network: Network with low-rank plus sparse layers.
        state: Its unsharded weights by name.

    Example:
        >>> network = nn.Sequential(SparseLowRankLinear(4, 6, rank=1, density=0.5, alpha=1))
        >>> {k: v.shape for k, v in densify_state_dict(network, network.state_dict()).items()}
        {'0.weight': torch.Size([6, 4])}
    """
    dense = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, layer in network.named_modules():
        if isinstance(layer, SparseLowRankLinear):
            lora_a, lora_b, value, index = (
                dense.pop(f"{name}.{part}") for part in STATE_DICT_PARTS
            )
            # half precision would round after the product and again after the sum
            exact = torch.promote_types(value.dtype, torch.float32)
            weight = dense_weight(lora_a.to(exact), lora_b.to(exact), value, index, layer.scale)
            dense[f"{name}.weight"] = weight.to(value.dtype)
    return dense


def rank_zero_seed() -> int:
    """Return torch's seed on rank 0, on every rank.

    Ranks with different supports would train different models.

    Example:
        >>> _ = torch.manual_seed(5)
        >>> rank_zero_seed()
        5
    """
    seeds = [torch.initial_seed()]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(seeds)
    return seeds[0]

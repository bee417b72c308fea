"""GaLore: AdamW with its moments in a low-rank subspace of the gradient, arXiv:2403.03507.

A gradient G is [out, in], a basis P [in, rank] of its right or [out, rank] of its left singular
vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lit_align.optim.in_backward import OptimizerInBackward

ParamGroup = dict[str, Any]


def num_state_values(rows: int, columns: int, rank: int) -> int:
    """Return how many numbers the optimizer keeps of a matrix [rows, columns].

    They are a projector [min, rank] and two moments [max, rank], or the two moments of AdamW
    [rows, columns] if projection saves nothing.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        rank: Dimensions of the subspace.

    Example:
        >>> num_state_values(4, 2, rank=1), num_state_values(4, 2, rank=2)  # AdamW: 2 x 4 x 2
        (10, 16)
    """
    small, large = sorted((rows, columns))
    return min(rank * (small + 2 * large), 2 * rows * columns)


def leading_singular_vectors(gradient: Tensor, rank: int, right: bool) -> Tensor:
    """Return the leading singular vectors [k, rank] of the gradient, largest first.

    They are eigenvectors of the Gram matrix of that side, which are faster than an SVD. The
    largest entry of each vector is positive, the first one of equal entries.

    Args:
        gradient: [out, in]. A sharded one is gathered, since a shard has other singular vectors.
        rank: Number of vectors.
        right: True for the right side (k = in), False for the left side (k = out).

    Example:
        >>> leading_singular_vectors(torch.tensor([[3.0, 4.0]]), rank=1, right=True)
        tensor([[0.6000],
                [0.8000]])
    """
    # The Gram matrix squares the condition number, so compute it in float64.
    wide = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).double()
    wide = wide.nan_to_num(0.0, 0.0, 0.0)  # eigh would raise; the projected gradient keeps its NaN
    vectors = torch.linalg.eigh(wide.mT @ wide if right else wide @ wide.mT).eigenvectors
    vectors = vectors[:, -rank:].flip(-1)
    # Moments are carried into the next subspace, so a sign that depends on rounding would decide
    # the step. Entries within 1e-4 of the largest count as equally large; the first one decides
    # the sign.
    sizes = vectors.abs()
    leading = (sizes > (1 - 1e-4) * sizes.amax(0)).int().argmax(0, keepdim=True)
    basis: Tensor = (vectors * vectors.gather(0, leading).sign()).to(gradient.dtype)
    if isinstance(gradient, DTensor):  # the vectors of rank 0, in case ranks round differently
        return distribute_tensor(basis, gradient.device_mesh, gradient.placements)
    return basis


def project(gradient: Tensor, basis: Tensor, right: bool) -> Tensor:
    """Return the gradient in the subspace: G P [out, rank] from the right, P^T G [rank, in] else.

    Args:
        gradient: [out, in]. The result is sharded like it.
        basis: [in, rank] for the right side, [out, rank] for the left side.
        right: True if the basis is of the right side.

    Example:
        >>> gradient, basis = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
        >>> project(gradient, basis, right=True).tolist()
        [[1.0], [3.0]]
    """
    projected = gradient @ replicate(basis) if right else basis.mT @ gradient
    return reshard_like(gradient, projected)


def project_back(projected: Tensor, basis: Tensor, right: bool) -> Tensor:
    """Return a projected gradient R in full space [out, in]: R P^T from the right, P R else.

    Args:
        projected: [out, rank] from the right side, [rank, in] from the left side.
        basis: [in, rank] for the right side, [out, rank] for the left side.
        right: True if the basis is of the right side.

    Example:
        >>> projected, basis = torch.tensor([[5.0, 6.0]]), torch.tensor([[0.0], [1.0]])
        >>> project_back(projected, basis, right=False).tolist()
        [[0.0, 0.0], [5.0, 6.0]]
    """
    return reshard_like(
        projected, projected @ replicate(basis).mT if right else basis @ replicate(projected)
    )


def replicate(tensor: Tensor) -> Tensor:
    """Return a sharded tensor [..] with all of its entries on each rank.

    Args:
        tensor: [..]. An unsharded one is returned unchanged.

    Example:
        >>> replicate(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return tensor


def reshard_like(other: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` [..] sharded like `other`.

    Args:
        other: Tensor with the placements to use.
        tensor: [..]. It is returned unchanged unless both are sharded.

    Example:
        >>> reshard_like(torch.zeros(4, 4), torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if isinstance(tensor, DTensor) and isinstance(other, DTensor):
        return tensor.redistribute(placements=other.placements)
    return tensor


class GaLoreAdamW(Optimizer):
    """AdamW in the subspace of the leading singular vectors of the gradient, arXiv:2403.03507.

    A group with `rank` (and `update_gap`, 200, and `scale`, 0.25) is projected: all of its
    matrices whose state becomes smaller. All other parameters get plain AdamW. As in the released
    code, eps is added before the bias correction and the weights decay after the update. The
    moments are carried into the next subspace. Clip and accumulate gradients before `step`.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate. A projected matrix has `scale` times this rate.
        betas: Decay rates of the two moments per step.
        eps: Term added to the root of the second moment, before the bias correction.
        weight_decay: Fraction of a weight that a step of learning rate 1 removes.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = GaLoreAdamW([{"params": [weight], "rank": 1}], lr=0.1)
        >>> optimizer.step(lambda: weight.sum().backward())
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters; a group with `rank` is projected."""
        if "rank" in param_group:
            for name, value in (("update_gap", 200), ("scale", 0.25)):
                param_group.setdefault(name, value)
            for name in ("rank", "update_gap"):
                if param_group[name] < 1:
                    raise ValueError(
                        f"{name} of GaLore must be at least 1, found {param_group[name]}. "
                        f"Set {name} to 1 or more."
                    )
        super().add_param_group(param_group)

    def is_projected(self, param: Tensor, group: ParamGroup) -> bool:
        """Return True if the parameter is a matrix [out, in] on which projection saves memory."""
        if param.ndim != 2 or "rank" not in group:
            return False
        rows, columns = param.shape
        return num_state_values(rows, columns, group["rank"]) < 2 * rows * columns

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update_param(param, param.grad, group)
        return loss

    @torch.no_grad()
    def update_param(self, param: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        """Update one parameter.

        Args:
            param: [..] weights; [out, in] if it is projected.
            gradient: [..] accumulated and clipped gradient.
            group: Settings of the group of the parameter.
        """
        state, projected = self.state[param], self.is_projected(param, group)
        right = param.ndim == 2 and param.shape[0] >= param.shape[1]
        if not state:
            state["step"] = torch.tensor(0)  # on the CPU, so that int() does not wait for a GPU
        moment_grad, scale = gradient, 1.0
        if projected:
            if int(state["step"]) % group["update_gap"] == 0:
                state["projector"] = leading_singular_vectors(gradient, group["rank"], right)
            moment_grad, scale = project(gradient, state["projector"], right), group["scale"]
        if "exp_avg" not in state:
            self.init_moments(moment_grad, state)
        state["step"] += 1
        change = self.adam_direction(moment_grad, state, group)
        if projected:
            change = project_back(change, state["projector"], right)
        step, (first, second) = int(state["step"]), group["betas"]
        # `eps` was added before. As in the released code, the bias correction changes only the step
        # size.
        rate = group["lr"] * (1 - second**step) ** 0.5 / (1 - first**step)
        param.add_(change, alpha=-rate * scale)
        if group["weight_decay"] > 0:
            param.add_(param, alpha=-group["lr"] * group["weight_decay"])

    def init_moments(self, moment_grad: Tensor, state: dict[str, Tensor]) -> None:
        """Add moments of zeros to the state of a parameter.

        Args:
            moment_grad: [..] gradient of the parameter, or its projection.
            state: State of the parameter.
        """
        state["exp_avg"], state["exp_avg_sq"] = (
            torch.zeros_like(moment_grad),
            torch.zeros_like(moment_grad),
        )

    def adam_direction(
        self, moment_grad: Tensor, state: dict[str, Tensor], group: ParamGroup
    ) -> Tensor:
        """Update the moments M and V [..] and return M / (sqrt(V) + eps) [..]."""
        (first, second), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(first).add_(moment_grad, alpha=1 - first)
        square.mul_(second).addcmul_(moment_grad, moment_grad, value=1 - second)
        return mean / square.sqrt().add_(group["eps"])


class GaLore(GaLoreAdamW):
    """GaLore for a whole model, which chooses projected matrices by parameter name.

    As in arXiv:2403.03507, they are the matrices of the blocks. Embeddings, output heads, norms
    and biases are not projected, nor are matrices on which projection saves no memory.

    Args:
        params: (name, tensor) pairs, as from `model.named_parameters()`, or groups of them.
        lr: Learning rate. A projected matrix has `scale` times this rate.
        rank: Dimensions of the subspace. None: plain AdamW for all parameters, for example
            with LoRA.
        update_gap: Number of steps for which a subspace is used.
        scale: Factor on the update of a projected matrix.
        targets: Regular expression that is searched in parameter names. The default matches the
            number of a block between dots.
        per_layer: Update each parameter during backward and free its gradient. Gradients can then
            be neither clipped nor accumulated, and DDP has nothing to average.

    Example:
        >>> names = ["blocks.0.weight", "blocks.0.bias", "head.weight"]
        >>> params = [torch.nn.Parameter(torch.ones(s)) for s in ((8, 4), (8,), (9, 4))]
        >>> optimizer = GaLore(zip(names, params), lr=0.1, rank=1)
        >>> [optimizer.is_projected(param, optimizer.param_groups[0]) for param in params]
        [True, False, False]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        rank: int | None = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        targets: str = r"\.\d+\.",
        per_layer: bool = False,
        **kwargs: Any,
    ):
        own = {"rank": rank, "update_gap": update_gap, "scale": scale}
        self.projection_settings = own if rank is not None else {}
        self.targets, self.per_layer = re.compile(targets), per_layer
        self.target_params: set[Tensor] = set()
        self.in_backward = OptimizerInBackward(self.update_in_backward)
        super().__init__(params, lr, **kwargs)
        self.register_step_post_hook(self.in_backward.reset)
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        if rank is not None and not any(self.is_projected(*pair) for pair in groups):
            raise ValueError(
                f"GaLore would project none of {len(groups)} parameters, found rank {rank} and "
                f"targets {targets!r}. Set a smaller rank, or targets that match parameter names."
            )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add named parameters and choose the projected ones.

        Args:
            param_group: Parameters and settings. `max_grad_norm`, if present, is the norm to which
                the caller clips their gradient.
        """
        if self.per_layer and param_group.get("max_grad_norm", math.inf) < math.inf:
            raise ValueError(
                "per_layer frees gradients before they can be clipped, found max_grad_norm "
                f"{param_group['max_grad_norm']}. Set max_grad_norm to .inf, or remove per_layer."
            )
        super().add_param_group({**self.projection_settings, **param_group})
        added = self.param_groups[-1]
        if self.projection_settings and "param_names" not in added:
            raise ValueError(
                "GaLore chooses matrices by parameter name, found parameters without names. "
                "Use (name, tensor) pairs such as model.named_parameters()."
            )
        for name, param in zip(added.get("param_names", ()), added["params"], strict=False):
            if self.targets.search(name):
                self.target_params.add(param)
        if self.per_layer:
            self.in_backward.register_hooks(added["params"], len(self.param_groups) - 1)

    def is_projected(self, param: Tensor, group: ParamGroup) -> bool:
        """Return True if `targets` match the parameter and projection saves memory."""
        return param in self.target_params and super().is_projected(param, group)

    def update_in_backward(self, group_index: int, param: Tensor, gradient: Tensor) -> None:
        """Update one parameter [..] of the group with this index."""
        self.update_param(param, gradient, self.param_groups[group_index])

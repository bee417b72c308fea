"""GaLore: AdamW whose moments live in a low-rank subspace of the gradient, arXiv:2403.03507."""

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
    """Numbers kept of a matrix: projector [min, rank] and two moments [max, rank].

    AdamW's two moments [rows, columns] where that is no less: the projection then saves nothing.
    """
    small, large = sorted((rows, columns))
    return min(rank * (small + 2 * large), 2 * rows * columns)


def leading_singular_vectors(gradient: Tensor, rank: int, right: bool) -> Tensor:
    """[k, rank]: the leading singular vectors of the gradient, by size, first largest.

    They are the eigenvectors of the Gram matrix of that side, which are found faster. Squaring
    costs half of the digits, and float64 has them to spare. Of each vector the largest entry is
    positive, the first one among equals: moments are carried over to the next subspace, and a
    sign that hangs on rounding would decide the step.

    Args:
        gradient: [out, in]; a sharded one is gathered, since a shard has other singular vectors.
        rank: Number of vectors.
        right: Whether of the right side (k = in) or of the left (k = out).
    """
    wide = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).double()
    wide = wide.nan_to_num(0.0, 0.0, 0.0)  # eigh would raise; projected, a NaN still is one
    vectors = torch.linalg.eigh(wide.mT @ wide if right else wide @ wide.mT).eigenvectors
    vectors = vectors[:, -rank:].flip(-1)
    sizes = vectors.abs()
    leading = (sizes > (1 - 1e-4) * sizes.amax(0)).int().argmax(0, keepdim=True)
    basis: Tensor = (vectors * vectors.gather(0, leading).sign()).to(gradient.dtype)
    if isinstance(gradient, DTensor):  # the first rank's vectors, should ranks round differently
        return distribute_tensor(basis, gradient.device_mesh, gradient.placements)
    return basis


def project(gradient: Tensor, basis: Tensor, right: bool) -> Tensor:
    """The gradient in the subspace: G P [out, rank] from the right, P^T G [rank, in] from the left.

    Sharded like the gradient.
    """
    projected = gradient @ replicate(basis) if right else basis.mT @ gradient
    return reshard_like(gradient, projected)


def project_back(projected: Tensor, basis: Tensor, right: bool) -> Tensor:
    """[out, in]: what `project` made, in full space: R P^T from the right, P R from the left."""
    return reshard_like(
        projected, projected @ replicate(basis).mT if right else basis @ replicate(projected)
    )


def replicate(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on each rank."""
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return tensor


def reshard_like(other: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, of which each rank keeps the share that it has of `other`."""
    if isinstance(tensor, DTensor) and isinstance(other, DTensor):
        return tensor.redistribute(placements=other.placements)
    return tensor


class GaLoreAdamW(Optimizer):
    """AdamW in the subspace of the gradient's leading singular vectors, arXiv:2403.03507.

    A group with `rank` (and `update_gap`, 200, and `scale`, 0.25) is projected: every matrix of
    it whose state becomes smaller. The rest is plain AdamW. As in the released code, eps comes
    before the bias correction and the decay after the update, and the moments are carried over
    when the subspace changes. The gradient to project is the accumulated and clipped one.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; of a projected matrix, `scale` times that.
        betas: Decay of the two moments per step.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Share of the weights that is lost per step and learning rate.
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
        """Adds parameters; a group with `rank` is projected."""
        if "rank" in param_group:
            for name, value in (("update_gap", 200), ("scale", 0.25)):
                param_group.setdefault(name, value)
            if param_group["rank"] < 1 or param_group["update_gap"] < 1:
                raise ValueError("GaLore needs a rank and an update_gap of at least 1.")
        super().add_param_group(param_group)

    def is_projected(self, param: Tensor, group: ParamGroup) -> bool:
        """Whether a parameter's moments live in the subspace: a matrix, where that saves memory."""
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
        """Updates every parameter that has a gradient."""
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
        """One step of one parameter.

        Args:
            param: Of any shape; a projected one is [out, in].
            gradient: Of the same shape, accumulated and clipped.
            group: The settings.
        """
        state, projected = self.state[param], self.is_projected(param, group)
        right = param.ndim == 2 and param.shape[0] >= param.shape[1]
        if not state:
            state["step"] = torch.tensor(0)  # on the CPU, so that reading it waits for no GPU
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
        rate = group["lr"] * (1 - second**step) ** 0.5 / (1 - first**step)
        param.add_(change, alpha=-rate * scale)
        if group["weight_decay"] > 0:
            param.add_(param, alpha=-group["lr"] * group["weight_decay"])

    def init_moments(self, moment_grad: Tensor, state: dict[str, Tensor]) -> None:
        """Adds the moments, zeros, to the state of a parameter.

        Args:
            moment_grad: What moments are taken of, the gradient or its projection.
            state: Of the parameter.
        """
        state["exp_avg"], state["exp_avg_sq"] = (
            torch.zeros_like(moment_grad),
            torch.zeros_like(moment_grad),
        )

    def adam_direction(
        self, moment_grad: Tensor, state: dict[str, Tensor], group: ParamGroup
    ) -> Tensor:
        """Adam's direction M / (sqrt(V) + eps), after both moments have taken in `moment_grad`."""
        (first, second), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(first).add_(moment_grad, alpha=1 - first)
        square.mul_(second).addcmul_(moment_grad, moment_grad, value=1 - second)
        return mean / square.sqrt().add_(group["eps"])


class GaLore(GaLoreAdamW):
    """GaLore for a whole model: its parameters' names decide which matrices are projected.

    As in the paper, those of the blocks are; embeddings, output heads, norms and biases are not,
    nor are matrices on which projection saves nothing.

    Args:
        params: (name, tensor) pairs, as of `model.named_parameters()`, or groups of them.
        lr: Learning rate; of a projected matrix, `scale` times that.
        rank: Dimensions of the subspace; None projects nothing, for networks that are low-rank
            already.
        update_gap: Steps from one subspace to the next.
        scale: Factor on the update of a projected matrix.
        targets: Regular expression found in the names of projected matrices; by default a block's
            number between dots.
        per_layer: Step on each parameter during backward and free its gradient at once. This
            leaves no gradient to clip or to accumulate, and DDP nothing to average.
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
        self.projected_params: set[Tensor] = set()
        self.in_backward = OptimizerInBackward(self.update_in_backward)
        super().__init__(params, lr, **kwargs)
        self.register_step_post_hook(self.in_backward.reset)
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        if rank is not None and not any(self.is_projected(*pair) for pair in groups):
            raise ValueError(
                f"GaLore would project none of {len(groups)} parameters: take a smaller rank than "
                f"{rank}, or targets that are in their names."
            )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Adds named parameters, and chooses which are projected.

        Args:
            param_group: Parameters and settings; `max_grad_norm`, if it is there, is the length to
                which the caller clips their gradient.
        """
        if self.per_layer and param_group.get("max_grad_norm", math.inf) < math.inf:
            raise ValueError(
                "per_layer leaves no gradient to clip: set max_grad_norm to .inf, or leave "
                "per_layer out."
            )
        super().add_param_group({**self.projection_settings, **param_group})
        added = self.param_groups[-1]
        if self.projection_settings and "param_names" not in added:
            raise ValueError(
                "GaLore chooses by name what it projects: give it (name, tensor) pairs, such as "
                "model.named_parameters()."
            )
        for name, param in zip(added.get("param_names", ()), added["params"], strict=False):
            if self.targets.search(name):
                self.projected_params.add(param)
        if self.per_layer:
            self.in_backward.register_hooks(added["params"], len(self.param_groups) - 1)

    def is_projected(self, param: Tensor, group: ParamGroup) -> bool:
        """Whether a parameter is a chosen matrix on which projection saves memory."""
        return param in self.projected_params and super().is_projected(param, group)

    def update_in_backward(self, number: int, param: Tensor, gradient: Tensor) -> None:
        """One step of one parameter of the group with that number."""
        self.update_param(param, gradient, self.param_groups[number])

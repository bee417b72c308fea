"""Optimizer groups: each role's weights have their own learning rate and gradient norm."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_align.errors import UserError

Group = dict[str, Any]


def role_group(
    role: str,
    network: nn.Module,
    weights: Iterable[nn.Parameter],
    max_grad_norm: float,
    role_lr: Mapping[str, float],
) -> Group:
    """Return the parameter group of a role, with the names of the weights.

    Args:
        role: Name of the role.
        network: The role's network, which names the weights.
        weights: The network's weights that train in this role.
        max_grad_norm: Gradient norm to which the role is clipped.
        role_lr: Learning rate by role. Other roles have the optimizer's.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> group = role_group("critic", linear, linear.parameters(), 1.0, {"critic": 0.5})
        >>> [name for name, _ in group["params"]], group["lr"]
        (['weight', 'bias'], 0.5)
    """
    names = {weight: name for name, weight in network.named_parameters()}
    named = [(names[weight], weight) for weight in weights]
    rate = {"lr": role_lr[role]} if role in role_lr else {}
    return {"params": named, "role": role, "max_grad_norm": max_grad_norm, **rate}


def build_optimizer(build: Callable[[list[Group]], Optimizer], groups: list[Group]) -> Optimizer:
    """Build the optimizer. A setting that it refuses becomes a `UserError` that names the flag.

    Args:
        build: Returns the optimizer of parameter groups.
        groups: One group per role.
    """
    try:
        return build(groups)
    except ValueError as error:  # torch's optimizers and those of `optim/` raise ValueError
        raise UserError(f"--model.optimizer: {error}") from error


def clip_by_role(groups: list[Group], max_grad_norm: float) -> dict[str, Tensor]:
    """Clip the gradients of each group in place, and return the norms before clipping.

    Args:
        groups: The optimizer's parameter groups.
        max_grad_norm: Norm to which a larger gradient is scaled down.

    Returns:
        A norm [] per role: `grad_norm` for a single role, else `grad_norm/<role>`.

    Example:
        >>> weight = nn.Parameter(Tensor([0.0, 0.0]))
        >>> weight.grad = Tensor([3.0, 4.0])
        >>> clip_by_role([{"params": [weight], "role": "policy"}], max_grad_norm=10.0)
        {'grad_norm': tensor(5.)}
    """
    norms = {}
    is_single = len({group["role"] for group in groups}) == 1
    for group in groups:
        norm = nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
        name = "grad_norm" if is_single else f"grad_norm/{group['role']}"
        # Each rank has a partial sum of the squared norm of sharded gradients. Gather before use.
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms

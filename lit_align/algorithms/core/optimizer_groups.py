"""Optimizer groups: each role's weights have their own learning rate and gradient norm."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Group = dict[str, Any]


def role_group(
    role: str,
    network: nn.Module,
    weights: Iterable[nn.Parameter],
    max_grad_norm: float,
    rates: Mapping[str, float],
) -> Group:
    """Return the parameter group of a role, with the names of the weights.

    Args:
        role: Name of the role.
        network: The role's network, which names the weights.
        weights: The network's weights that train in this role.
        max_grad_norm: Gradient norm to which the role is clipped.
        rates: Learning rates of roles that do not have the optimizer's.
    """
    names = {weight: name for name, weight in network.named_parameters()}
    named = [(names[weight], weight) for weight in weights]
    rate = {"lr": rates[role]} if role in rates else {}
    return {"params": named, "role": role, "max_grad_norm": max_grad_norm, **rate}


def clip_by_role(groups: list[Group], max_grad_norm: float) -> dict[str, Tensor]:
    """Clip the gradients of each group in place, and return the norms before clipping.

    Args:
        groups: The optimizer's parameter groups.
        max_grad_norm: Norm to which a larger gradient is scaled down.
    """
    norms = {}
    single = len({group["role"] for group in groups}) == 1
    for group in groups:
        norm = nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
        name = "grad_norm" if single else f"grad_norm/{group['role']}"
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms

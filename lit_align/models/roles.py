"""Roles of a run: the network, adapter and head that serve each one, and the printed table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lit_align.models.backbone import Backbone


class Role(NamedTuple):
    """One role and the network, adapter and head that serve it.

    Args:
        name: Name of the role: policy, reference, critic, reward, ...
        network: Network of the role. Roles that share a network share its backbone weights.
        adapter: Active adapter of the network, `off` if all are disabled, `-` if it has none.
        head: Head of the role: language, score or value.
        weights: All weights that the role computes with.
    """

    name: str
    network: Backbone
    adapter: str
    head: str
    weights: list[nn.Parameter]


def single_head_role(name: str, network: Backbone, adapter: str = "default") -> Role:
    """Return the role of a network with one head.

    Args:
        name: Name of the role.
        network: Network with one head.
        adapter: Active adapter if the network has adapters, or `off`. Default: peft's first name.
    """
    active_adapter = adapter if network.adapted is not None else "-"
    kinds = (".lora_", ".modules_to_save.")
    weights = [
        weight
        for key, weight in network.network.named_parameters()
        if f".{active_adapter}." in key or not any(kind in key for kind in kinds)
    ]
    return Role(name, network, active_adapter, network.head_name, weights)


def role_table(roles: Iterable[Role]) -> list[str]:
    """Return the lines of the role table.

    Trained weights are numbers and sizes are bytes, over all ranks. A weight that several roles
    share is counted in the first of them.

    Args:
        roles: Roles in the order of the table.

    Example:
        >>> from types import SimpleNamespace
        >>> shared = [nn.Parameter(nn.Linear(4, 2).weight)]
        >>> policy = Role("policy", SimpleNamespace(name="tiny"), "-", "language", shared)
        >>> [line.split()[-2:] for line in role_table([policy, policy])[1:]]
        [['8', '32'], ['0', '0']]
    """
    rows = [("role", "backbone", "adapter", "head", "trained weights", "bytes")]
    seen: set[int] = set()
    for role in roles:
        unseen = [weight for weight in role.weights if id(weight) not in seen]
        seen.update(map(id, unseen))
        trained = sum(weight.numel() for weight in unseen if weight.requires_grad)
        size = sum(weight.numel() * weight.element_size() for weight in unseen)
        name = role.network.name
        rows.append((role.name, name, role.adapter, role.head, f"{trained:,}", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join([*cells, *numbers]))
    return lines

"""Who plays what: the table that is printed when a run starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lit_align.models.backbone import Backbone


class Role(NamedTuple):
    """One role and what serves it.

    Args:
        name: policy, reference, critic, reward, ...
        network: What it runs on; roles that share a network share its trunk.
        adapter: Which of the network's adapters is on, `off` for none of them, - if it has none.
        head: What is read: language, score or value.
        weights: All weights that it computes with.
    """

    name: str
    network: Backbone
    adapter: str
    head: str
    weights: list[nn.Parameter]


def single_head_role(name: str, network: Backbone, adapter: str = "default") -> Role:
    """A role that reads its network's one head.

    Args:
        name: Of the role.
        network: What it runs on.
        adapter: Which adapter is on, if the network has any; `off` for none.
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
    """Lines of a table; weights are counted where they appear first, over all ranks."""
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

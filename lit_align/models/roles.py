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


def whole(name: str, network: Backbone, adapter: str = "default") -> Role:
    """A role that reads its network's one head.

    Args:
        name: Of the role.
        network: What it runs on.
        adapter: Which adapter is on, if the network has any; `off` for none.
    """
    worn = adapter if network.adapted is not None else "-"
    kinds = (".lora_", ".modules_to_save.")
    weights = [
        weight
        for key, weight in network.network.named_parameters()
        if f".{worn}." in key or not any(kind in key for kind in kinds)
    ]
    return Role(name, network, worn, network.reads, weights)


def table(roles: Iterable[Role]) -> list[str]:
    """Lines of a table; weights are counted where they appear first, over all ranks."""
    rows = [("role", "backbone", "adapter", "head", "trained weights", "bytes")]
    seen: set[int] = set()
    for role in roles:
        own = [weight for weight in role.weights if id(weight) not in seen]
        seen.update(map(id, own))
        trained = sum(weight.numel() for weight in own if weight.requires_grad)
        size = sum(weight.numel() * weight.element_size() for weight in own)
        name = role.network.name
        rows.append((role.name, name, role.adapter, role.head, f"{trained:,}", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [word.ljust(width) for word, width in zip(row[:4], widths[:4], strict=True)]
        numbers = [word.rjust(width) for word, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join([*words, *numbers]))
    return lines

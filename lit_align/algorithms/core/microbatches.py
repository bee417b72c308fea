"""Micro-batches of one optimizer step: split on all ranks, joined, and checked for NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from lit_align.batches import microbatch_indices
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.sharding import set_gradient_sync

Compute = Callable[[Any], tuple[Tensor, ...]]  # from a micro-batch to tensors [n, r] or [n]


class FiniteRows(NamedTuple):
    """Rows of one micro-batch, with a flag for each whose losses are finite.

    Args:
        rows: [n] indices of the rows in the batch of the optimizer step.
        columns: The data set's own columns, if the batch has them.
        finite: [n] bool on the device. Read it once per step, since reading waits for the device.
    """

    rows: list[int]
    columns: dict[str, list[Any]]
    finite: Tensor


def split_on_all_ranks(
    lengths: Sequence[int], max_tokens: int, strategy: Strategy
) -> list[list[int]]:
    """Return the row indices of each micro-batch. All ranks have the same number of them.

    A rank with fewer micro-batches would skip the collectives of a sharded forward pass, and the
    other ranks would wait for it.

    Args:
        lengths: [N] tokens of each row of this rank.
        max_tokens: Padded tokens of a micro-batch.
        strategy: Lightning's strategy, which connects the ranks.
    """
    rows = microbatch_indices(lengths, max_tokens)
    number = torch.tensor(len(rows), device=strategy.root_device)
    most = strategy.reduce(number, reduce_op="max")
    return microbatch_indices(lengths, max_tokens, min_microbatches=int(most))


def join_microbatches(parts: Iterable[Tensor], rows: list[list[int]], width: int) -> Tensor:
    """Join one result of all micro-batches into [N, R] or [N], padded with 0.

    Args:
        parts: [n, r] or [n] of each micro-batch; r is at most `width`.
        rows: Row indices of each micro-batch in the batch of N rows.
        width: R.

    Example:
        >>> parts = [torch.tensor([[3, 4]]), torch.tensor([[1], [2]])]
        >>> join_microbatches(parts, [[2], [0, 1]], width=2).tolist()
        [[1, 0], [2, 0], [3, 4]]
    """
    padded = [pad(part, (0, width - part.shape[1])) if part.ndim > 1 else part for part in parts]
    order = [row for part in rows for row in part]
    joined = torch.cat(padded)
    # Position of each row in `joined`. Computed on the CPU, so that no step waits for the device.
    positions = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    return joined[positions.to(joined.device)]


def sync_gradients(networks: Iterable[Backbone], replica: nn.Module | None, last: bool) -> None:
    """Choose whether the next backward averages gradients over the ranks or adds them locally.

    Args:
        networks: Networks that train, sharded or not.
        replica: The strategy's model, which DDP wraps.
        last: True if no micro-batch of the step follows.
    """
    for network in networks:
        set_gradient_sync(network, network.shard_state, last)
    if isinstance(replica, DistributedDataParallel):
        # The flag behind DDP's `no_sync`, which would need a context around forward and backward.
        # Checked with torch 2.13.
        replica.require_backward_grad_sync = last

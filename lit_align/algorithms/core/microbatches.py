"""Micro-batches of one optimizer step, on all ranks alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from lit_align.batches import microbatch_indices
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.sharding import set_gradient_sync

Compute = Callable[[Any], tuple[Tensor, ...]]  # from a micro-batch to tensors [n, r] or [n]


def split_on_all_ranks(
    lengths: Sequence[int], max_tokens: int, strategy: Strategy
) -> list[list[int]]:
    """Return the row indices of each micro-batch; all ranks have the same number of them.

    Args:
        lengths: [N] tokens of each row of this rank.
        max_tokens: Padded tokens of a micro-batch.
        strategy: Lightning's, which knows the ranks.
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
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    return joined[back.to(joined.device)]


def sync_gradients(networks: Iterable[Backbone], replica: nn.Module | None, last: bool) -> None:
    """Choose whether the next backward averages gradients over the ranks or adds them locally.

    Args:
        networks: Networks that train, sharded or not.
        replica: The strategy's model, which DDP wraps.
        last: No micro-batch of the step follows.
    """
    for network in networks:
        set_gradient_sync(network, network.shard_state, last)
    if isinstance(replica, DistributedDataParallel):
        replica.require_backward_grad_sync = last

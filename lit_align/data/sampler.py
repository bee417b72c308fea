"""Which rank takes which row when: an order that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from lit_align.errors import UserError


class IndexedRows(Dataset[tuple[Any, bool]]):
    """Encoded rows; a position beyond the last row is a repeated row, marked by False.

    Args:
        examples: One entry per row.
    """

    def __init__(self, examples: list[Any]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> tuple[Any, bool]:
        count = len(self.examples)
        return self.examples[position % count], position < count


class ResumableSampler(DistributedSampler[int]):
    """Positions of one rank: every W-th of a global order, from its rank on.

    In training the order is a permutation by seed and epoch without the last incomplete batch of
    all ranks, so the ranks' k-th batches together are the k-th batch of one process with as many
    rows. In evaluation it is the data's own, with rows repeated until every rank has as many.
    It is a DistributedSampler so that Lightning leaves it in place and tells it the epoch.

    Args:
        rows: The rows to be ordered.
        batch_size: Rows per batch and rank.
        training: Whether to permute and to leave out the last incomplete batch.
        seed: Of the permutations.
        max_batches: Batches of a training epoch, if not all.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(
        self,
        rows: IndexedRows,
        batch_size: int,
        training: bool,
        seed: int = 0,
        max_batches: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        super().__init__(rows, num_replicas, rank, shuffle=training, seed=seed)
        self.num_rows = count = len(rows)
        batch = batch_size * num_replicas
        if training and count < batch:
            raise UserError(
                f"{count} rows do not fill one batch of {batch_size} rows on each of "
                f"{num_replicas} ranks: lower data.batch_size"
            )
        num_batches = count // batch if max_batches is None else min(count // batch, max_batches)
        padded_size = -(-count // num_replicas) * num_replicas
        self.total_size = num_batches * batch if training else padded_size
        self.num_samples = self.total_size // num_replicas

    def __iter__(self) -> SamplerIterator:
        return SamplerIterator(self)

    def positions(self, epoch: int) -> list[int]:
        """This rank's positions in an epoch."""
        if not self.shuffle:
            return list(range(self.rank, self.total_size, self.num_replicas))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.num_rows, generator=generator).tolist()
        return order[self.rank : self.total_size : self.num_replicas]


class SamplerIterator(Iterator[int]):
    """One pass over a ResumableSampler that knows where it is: epoch, and rows taken by all ranks.

    Args:
        sampler: What to pass over, in the epoch that it is in.
    """

    def __init__(self, sampler: ResumableSampler):
        self.sampler = sampler
        self.epoch = sampler.epoch
        self.num_taken = 0
        self.positions = sampler.positions(self.epoch)

    def __next__(self) -> int:
        if self.num_taken == len(self.positions):
            raise StopIteration
        self.num_taken += 1
        return self.positions[self.num_taken - 1]

    def state_dict(self) -> dict[str, int]:
        """Epoch and global rows taken: no rank's own, so one rank's state serves all."""
        return {"epoch": self.epoch, "rows": self.num_taken * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the state was; from the start where the order is in a later epoch."""
        epoch, rows = state["epoch"], state["rows"]
        if rows >= self.sampler.total_size:
            epoch, rows = epoch + 1, 0
        if epoch >= self.sampler.epoch:
            self.epoch, self.num_taken = epoch, rows // self.sampler.num_replicas
            self.positions = self.sampler.positions(epoch)

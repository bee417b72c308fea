"""Row order that is the same for any number of ranks and can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from lit_align.errors import UserError


class IndexedRows(Dataset[tuple[Any, bool]]):
    """Encoded rows by position. Positions after the last row repeat rows, marked by False.

    Args:
        examples: Encoded rows.

    Example:
        >>> rows = IndexedRows(["a", "b"])
        >>> rows[1], rows[2]
        (('b', True), ('a', False))
    """

    def __init__(self, examples: list[Any]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> tuple[Any, bool]:
        count = len(self.examples)
        return self.examples[position % count], position < count


class ResumableSampler(DistributedSampler[int]):
    """Positions of one rank: entries rank, rank + W, ... of a global order, for W ranks.

    Training uses a permutation by seed and epoch and drops the last incomplete batch. Batch k of
    all ranks together equals batch k of one process with the same number of rows. Evaluation uses
    the data order and repeats rows until all ranks have the same number.

    Args:
        rows: Rows that are permuted.
        batch_size: Rows per batch and rank.
        training: Permute the rows and drop the last incomplete batch.
        seed: Seed of the permutations.
        max_batches: Batches of a training epoch. Default: all.
        num_replicas: Number of ranks.
        rank: Index of this rank.

    Example:
        >>> rows = IndexedRows(["a", "b", "c"])
        >>> [list(ResumableSampler(rows, 2, False, num_replicas=2, rank=rank)) for rank in (0, 1)]
        [[0, 2], [1, 3]]
    """

    # a subclass of DistributedSampler: Lightning 2.6 then keeps it and calls set_epoch

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
                f"{num_replicas} ranks. Lower --data.batch_size."
            )
        num_batches = count // batch if max_batches is None else min(count // batch, max_batches)
        padded_size = -(-count // num_replicas) * num_replicas
        self.total_size = num_batches * batch if training else padded_size
        self.num_samples = self.total_size // num_replicas

    def __iter__(self) -> SamplerIterator:
        return SamplerIterator(self)

    def positions(self, epoch: int) -> list[int]:
        """Return this rank's positions in an epoch.

        Example:
            >>> sampler = ResumableSampler(IndexedRows([5, 6, 7, 8]), 2, training=True)
            >>> sampler.positions(0) == sampler.positions(0), sorted(sampler.positions(1))
            (True, [0, 1, 2, 3])
        """
        if not self.shuffle:
            return list(range(self.rank, self.total_size, self.num_replicas))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.num_rows, generator=generator).tolist()
        return order[self.rank : self.total_size : self.num_replicas]


class SamplerIterator(Iterator[int]):
    """One pass over a ResumableSampler, which can be saved and resumed.

    Args:
        sampler: Sampler of the positions, at the epoch of this pass.

    Example:
        >>> sampler = ResumableSampler(IndexedRows([5, 6, 7, 8]), 2, training=True)
        >>> iterator = iter(sampler)
        >>> next(iterator) == sampler.positions(0)[0], iterator.state_dict()
        (True, {'epoch': 0, 'rows': 1})
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
        """Return the epoch and the rows taken by all ranks. The state is equal on each rank."""
        return {"epoch": self.epoch, "rows": self.num_taken * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the position. If the sampler is already in a later epoch, start at 0.

        Example:
            >>> iterator = iter(ResumableSampler(IndexedRows([5, 6, 7, 8]), 2, training=True))
            >>> iterator.load_state_dict({"epoch": 1, "rows": 2})
            >>> iterator.epoch, len(list(iterator))
            (1, 2)
        """
        epoch, rows = state["epoch"], state["rows"]
        # a checkpoint after the last batch of an epoch resumes with the next epoch
        if rows >= self.sampler.total_size:
            epoch, rows = epoch + 1, 0
        if epoch >= self.sampler.epoch:
            self.epoch, self.num_taken = epoch, rows // self.sampler.num_replicas
            self.positions = self.sampler.positions(epoch)

"""What a reference said of each pair, so that the reference need not stay in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batches import PreferenceBatch
from lit_align.errors import UserError


class PrecomputedLogprobs:
    """Summed log-probs of pairs, found by the pairs' fingerprints: order and epoch do not matter.

    They are Python numbers on the CPU. A run stores them in its checkpoints.
    """

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}

    def __len__(self) -> int:
        return len(self.sums)

    def store(self, pairs: Tensor, sums: Tensor) -> None:
        """Replaces all by what is given.

        Args:
            pairs: [n] fingerprints.
            sums: [n, 2] nats of the chosen and of the rejected answer.
        """
        self.sums = dict(zip(pairs.tolist(), sums.tolist(), strict=True))

    def lookup(self, pairs: list[int]) -> tuple[Tensor, Tensor]:
        """([B], [B]) nats of the chosen and of the rejected answers of these fingerprints."""
        num_unknown = sum(pair not in self.sums for pair in pairs)
        if num_unknown:
            raise UserError(
                f"{num_unknown} pairs of a batch are not among those that precompute scored at the "
                f"start: train on the same data with the same tokenizer, and evaluate other data "
                f"without precompute."
            )
        both = torch.tensor([self.sums[pair] for pair in pairs], dtype=torch.float32)
        return both[:, 0], both[:, 1]

    def state_dict(self) -> dict[str, Tensor]:
        """What `store` takes."""
        sums = torch.tensor([*self.sums.values()], dtype=torch.float32)
        return {"pairs": torch.tensor([*self.sums], dtype=torch.int64), "sums": sums.view(-1, 2)}


def rank_batches(loader: DataLoader[Any], rank: int, ranks: int) -> Iterator[PreferenceBatch]:
    """Batches of a rank's part of all rows in the data's order, equally many for every rank.

    Args:
        loader: Of whose data set, batch size and collation; its own order is left alone.
        rank: Whose part.
        ranks: Number of parts.
    """
    data: Any = loader.dataset
    size, count = loader.batch_size or 1, len(data)
    rows = [(rank + ranks * step) % count for step in range(-(-count // ranks))]
    for start in range(0, len(rows), size):
        batch: PreferenceBatch = loader.collate_fn(
            [data[row] for row in rows[start : start + size]]
        )
        yield batch

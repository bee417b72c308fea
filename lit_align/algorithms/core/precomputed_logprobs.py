"""Precomputed reference log-probs of preference pairs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batches import PreferenceBatch
from lit_align.errors import UserError


class PrecomputedLogprobs:
    """Summed log-probs of preference pairs, by fingerprint of the pair.

    The order of the rows and the epoch do not matter. The values are Python numbers on the CPU.
    A run saves them in its checkpoints.

    Example:
        >>> logprobs = PrecomputedLogprobs()
        >>> logprobs.store(torch.tensor([7, 8]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
        >>> chosen, rejected = logprobs.lookup([8])
        >>> chosen.item(), rejected.item()
        (-3.0, -4.0)
    """

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}  # [chosen, rejected] nats by fingerprint

    def __len__(self) -> int:
        return len(self.sums)

    def store(self, pairs: Tensor, sums: Tensor) -> None:
        """Replace all stored values.

        Args:
            pairs: [n] fingerprints.
            sums: [n, 2] nats of the chosen and the rejected response.
        """
        self.sums = dict(zip(pairs.tolist(), sums.tolist(), strict=True))

    def lookup(self, pairs: list[int]) -> tuple[Tensor, Tensor]:
        """Return the log-probs [B] of the chosen and [B] of the rejected responses, in nats.

        Args:
            pairs: [B] fingerprints.
        """
        num_unknown = sum(pair not in self.sums for pair in pairs)
        if num_unknown:
            raise UserError(
                f"{num_unknown} pairs of a batch have no precomputed reference log-probs. Train "
                f"on the same data with the same tokenizer. To evaluate other data, set "
                f"--model.precompute false."
            )
        both = torch.tensor([self.sums[pair] for pair in pairs], dtype=torch.float32)
        return both[:, 0], both[:, 1]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the arguments of `store`: pairs [n] and sums [n, 2]."""
        sums = torch.tensor([*self.sums.values()], dtype=torch.float32)
        return {"pairs": torch.tensor([*self.sums], dtype=torch.int64), "sums": sums.view(-1, 2)}


def rank_batches(loader: DataLoader[Any], rank: int, ranks: int) -> Iterator[PreferenceBatch]:
    """Yield the batches of one rank's share of all rows. Each rank has the same number of them.

    Args:
        loader: Its data set, batch size and collation are used. Its order is not.
        rank: Index of the rank.
        ranks: Number of ranks.

    Example:
        >>> loader = DataLoader(range(5), batch_size=2, collate_fn=list)
        >>> [[*rank_batches(loader, rank, ranks=2)] for rank in range(2)]
        [[[0, 2], [4]], [[1, 3], [0]]]
    """
    data: Any = loader.dataset
    size, count = loader.batch_size or 1, len(data)
    # The last rows of some ranks repeat the first rows, so that no rank waits in a collective.
    rows = [(rank + ranks * step) % count for step in range(-(-count // ranks))]
    for start in range(0, len(rows), size):
        batch: PreferenceBatch = loader.collate_fn(
            [data[row] for row in rows[start : start + size]]
        )
        yield batch

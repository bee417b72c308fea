"""What SFT, reward model and DPO share: one pass, one step."""

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lit_align.algorithms.core.base import Algorithm
from lit_align.batches import AnyBatch


class OfflineAlgorithm(Algorithm):
    """Learns from a fixed data set: each Lightning batch is one optimizer step."""

    def training_step(self, batch: AnyBatch, batch_idx: int) -> STEP_OUTPUT:
        """One update on the batch."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
        with self.phase("update"):
            metrics = self.update(batch)
        self.end_iteration(metrics)
        return None

    def prepare(self, batch: AnyBatch) -> AnyBatch:
        """Adds what is constant during the update, such as a reference's log-probs."""
        return batch

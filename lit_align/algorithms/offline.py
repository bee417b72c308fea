"""What SFT, reward model and DPO share: one pass, one step."""

from lightning.pytorch.utilities.types import STEP_OUTPUT

from lit_align.algorithms.base import Algorithm, AnyBatch


class OfflineAlgorithm(Algorithm):
    """Learns from a fixed data set: each Lightning batch is one optimizer step."""

    def training_step(self, batch: AnyBatch, batch_idx: int) -> STEP_OUTPUT:
        """One update on the batch."""
        self.end_iteration(self.update(batch))
        return None

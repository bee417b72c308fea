"""Several answers to each held-out prompt, for a comparison of models."""

from typing import Any

from lightning.pytorch import Trainer

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.callbacks.rollout import Rollout


class Asking(Rollout):
    """A rollout whose `predict` answers each prompt several times, with equal noise for all models.

    Args:
        num_samples: Answers per prompt; 1 where they are greedy.
        **kwargs: Those of Rollout.
    """

    def __init__(self, num_samples: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        if num_samples < 1 or (self.predict_greedily and num_samples > 1):
            raise ValueError(
                f"num_samples must be at least 1, and 1 where answers are greedy: found "
                f"{num_samples}."
            )
        self.num_samples = num_samples

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """All answers to a batch of prompts."""
        greedy = int(self.predict_greedily)
        samples = self.num_samples * (1 - greedy)
        self.answer(trainer, algorithm, batch, samples, greedy, f"predict {batch_idx}")

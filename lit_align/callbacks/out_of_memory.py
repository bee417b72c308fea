"""Advice when memory runs out in an evaluation."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

ADVICE = (
    "Out of memory in phase evaluate: lower --data.eval_batch_size or --model.microbatch_tokens, "
    "or set --model.policy.dtype bfloat16."
)
EVALUATIONS = (
    RunningStage.SANITY_CHECKING,
    RunningStage.VALIDATING,
    RunningStage.TESTING,
    RunningStage.PREDICTING,
)


class OutOfMemoryAdvice(Callback):
    """Name three settings in the error when memory runs out in a validation, test or prediction.

    The phases of a training iteration do so themselves (`Algorithm.phase`).
    """

    def on_exception(
        self, trainer: Trainer, algorithm: LightningModule, exception: BaseException
    ) -> None:
        """Put the advice before the error's own text."""
        if isinstance(exception, torch.OutOfMemoryError) and trainer.state.stage in EVALUATIONS:
            exception.args = (f"{ADVICE} {exception}",)

"""Trainer settings that an algorithm's step cannot work with, and one that it needs."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lit_align.errors import UserError
from lit_align.models.parallel.fsdp2 import FSDP2


def check_trainer(trainer: Trainer) -> None:
    """Refuse a precision or a strategy under which a step would fail or train wrongly.

    Args:
        trainer: The trainer of the run, with its strategy.
    """
    if trainer.precision == "16-mixed":
        raise UserError(
            "precision 16-mixed is not supported: gradient clipping ignores its loss scale. "
            "Set --trainer.precision bf16-mixed."
        )
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            "FSDPStrategy is not supported: it wraps the whole training step, and the model cannot "
            "generate then. Set --trainer.strategy fsdp2, which shards in the same way."
        )
    # FSDP2 subclasses ModelParallelStrategy, but its mesh has no dimension of this name.
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        width = strategy.device_mesh["tensor_parallel"].size()
        if width > 1:
            raise UserError(
                f"Tensor parallelism over {width} ranks is not supported: these ranks would read "
                f"different rows. Set --trainer.strategy fsdp2."
            )


def enable_unused_weights(strategy: Strategy) -> None:
    """Let DDP accept a backward pass that skips weights. A value that the user set stays.

    Args:
        strategy: The strategy of the run. Strategies other than DDP need no setting.
    """
    if isinstance(strategy, DDPStrategy):
        # Private: the arguments of torch's DistributedDataParallel. Lightning has no public way
        # to add one after the trainer has built its strategy. Checked with Lightning 2.6.6.
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

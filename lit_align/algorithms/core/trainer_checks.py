"""Trainer settings that an algorithm's step needs or cannot work with."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lit_align.errors import UserError
from lit_align.models.parallel.fsdp2 import FSDP2


def check_trainer(trainer: Trainer) -> None:
    """Refuse a precision or a strategy under which a step would fail or train wrongly."""
    if trainer.precision == "16-mixed":
        raise UserError("16-mixed scales losses, and clipping would not: take bf16-mixed.")
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            "FSDPStrategy wraps the whole step and cannot serve one that generates: take "
            "--trainer.strategy fsdp2, which shards the same way."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        width = strategy.device_mesh["tensor_parallel"].size()
        if width > 1:
            raise UserError(
                f"ModelParallelStrategy splits tensors over {width} ranks, which would see "
                f"different rows: take --trainer.strategy fsdp2, which splits none."
            )


def find_unused_parameters(strategy: Strategy) -> None:
    """Make DDP look for weights that a backward pass does not reach, unless the user said no."""
    if isinstance(strategy, DDPStrategy):
        # Private, but the only place after the trainer has built its strategy: the arguments of
        # torch's DistributedDataParallel. Checked with Lightning 2.6.6.
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

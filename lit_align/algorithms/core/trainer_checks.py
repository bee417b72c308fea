"""Trainer settings that an algorithm's step cannot work with."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_align.models.parallel.fsdp2 import FSDP2


def check_trainer(trainer: Trainer) -> None:
    """Refuse a precision or a strategy under which a step would fail or train wrongly."""
    if trainer.precision == "16-mixed":
        raise ValueError("16-mixed scales losses, and clipping would not: take bf16-mixed.")
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "FSDPStrategy wraps the whole step and cannot serve one that generates: take "
            "--trainer.strategy fsdp2, which shards the same way."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        width = strategy.device_mesh["tensor_parallel"].size()
        if width > 1:
            raise ValueError(
                f"ModelParallelStrategy splits tensors over {width} ranks, which would see "
                f"different rows: take --trainer.strategy fsdp2, which splits none."
            )

"""Metric accumulation over micro-batches, evaluation batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.batches import AnyBatch

Means = dict[str, Tensor]


class MetricAccumulator:
    """Means that an algorithm logs: once per iteration in training, once per epoch in evaluation.

    Training keeps its own sums. All means of an iteration then need one reduction over the ranks,
    and no value is read from the device. torchmetrics would gather each mean separately and read
    each batch to look for NaN. Evaluation runs less often and uses torchmetrics.

    The object is not a module, so a state dict does not contain it.

    Example:
        >>> metrics = MetricAccumulator()
        >>> metrics.add("kl", torch.tensor([[1.0, 9.0]]), torch.tensor([[True, False]]))
        >>> metrics.add("kl", torch.tensor([[3.0, 5.0]]), torch.tensor([[True, True]]))
        >>> metrics.sums["kl"]  # the sum of the values, and how many there are
        tensor([9., 3.])
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # [2] sum and number of this iteration, by name
        self.eval_means: dict[str, MeanMetric] = {}  # means of this evaluation, by name

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add training values to the mean that is logged when the iteration ends.

        Args:
            name: Name in the log.
            values: [n, R] or [n].
            mask: Same shape, True where a value counts. Other values are not read.
        """
        # float32: a sum of many bf16 values would stop growing.
        counted = torch.where(mask, values.detach().float(), 0.0)
        total = torch.stack([counted.sum(), mask.sum()])
        self.sums[name] = self.sums.get(name, 0.0) + total

    def add_all(self, means: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add several means.

        Args:
            means: (values, mask) by name, each [n, R] or [n].
        """
        for name, (values, mask) in means.items():
            self.add(name, values, mask)

    def log_train(self, module: LightningModule) -> None:
        """Log the means over all ranks since the last call, and start again.

        Args:
            module: Logs the means. A mean without values is logged as 0.
        """
        if self.sums:
            sums = module.trainer.strategy.reduce(
                torch.stack([*self.sums.values()]), reduce_op="sum"
            )
            totals, numbers = sums.unbind(-1)
            means = totals / numbers.clamp(min=1.0)
            module.log_dict(dict(zip(self.sums, means, strict=True)))
            self.sums = {}

    def add_eval(self, batch: AnyBatch, **means: tuple[Tensor, Tensor]) -> None:
        """Add one evaluation batch.

        Args:
            batch: Rows with `is_new` False repeat earlier rows to fill the last batch. They are
                not counted.
            **means: (values, mask or weights) by name, each [n, R] or [n].
        """
        for name, (values, weights) in means.items():
            if name not in self.eval_means:  # float32 also if the weights are bf16
                metric = MeanMetric().to(values.device).set_dtype(torch.float32)
                self.eval_means[name] = metric
            counted = torch.tensor(batch.is_new, device=values.device)
            rows = counted.view(-1, *[1] * (weights.ndim - 1))
            kept = values.float().where(weights > 0, 0.0)
            self.eval_means[name].update(kept, (weights * rows).float())

    def compute_eval(self) -> Means:
        """Return the means over all evaluated rows of all ranks by name, and start again."""
        means = {name: metric.compute() for name, metric in self.eval_means.items()}
        self.eval_means.clear()
        return means

    def log_eval(
        self, module: LightningModule, stage: str, derive: Callable[[Means], Means]
    ) -> None:
        """Log the means of an evaluation as `<stage>/<name>`.

        Args:
            module: Logs the means.
            stage: `val` or `test`.
            derive: Returns metrics that are computed from the means.
        """
        means = self.compute_eval()
        means |= derive(means)
        module.log_dict({f"{stage}/{name}": value for name, value in means.items()})

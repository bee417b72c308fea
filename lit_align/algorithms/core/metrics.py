"""What an algorithm says of itself: means over all ranks, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.batches import AnyBatch


class Watcher(Protocol):
    """Wants to know in which phase a run is: load, rollout, score, prepare or update."""

    def begin(self, phase: str) -> None:
        """A phase starts."""

    def end(self, phase: str) -> None:
        """It is over, if nothing was raised."""


class Judged(NamedTuple):
    """Whether the losses of a micro-batch are finite.

    Args:
        rows: [n] their places in what the step is made on.
        columns: The data set's own, if the batch has them.
        finite: [n] on the device; to be read once per step.
    """

    rows: list[int]
    columns: dict[str, list[Any]]
    finite: Tensor


class Measuring(LightningModule):
    """Collects numbers of micro-batches and ranks, and tells watchers which phase a run is in."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.notes: dict[str, Tensor] = {}  # sum and number of what `losses` noted, by name
        self.means: dict[str, MeanMetric] = {}  # of the evaluation under way, by name
        self.watchers: list[Watcher] = []
        self.judged: list[Judged] = []  # micro-batches of the optimizer step under way
        self.norms: dict[str, Tensor] = {}  # of its gradients before clipping, by role

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks what happens inside as one phase of an iteration.

        Args:
            name: load, rollout, score, prepare or update.
        """
        for watcher in self.watchers:
            watcher.begin(name)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{ADVICE[name]} {error}") from error
        for watcher in self.watchers:
            watcher.end(name)

    def note(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Adds to a mean that is logged when the iteration ends; for `losses` to call.

        Args:
            name: Of the metric.
            values: [n, R] or [n].
            mask: Of the same shape, True where a value counts.
        """
        counted = torch.where(mask, values.detach().float(), 0.0)
        self.notes[name] = self.notes.get(name, 0.0) + torch.stack([counted.sum(), mask.sum()])

    def judge(self, batch: AnyBatch, rows: list[int], losses: Tensor) -> None:
        """Notes which rows have a finite loss, and reads nothing.

        Args:
            batch: A micro-batch.
            rows: [n] places of its rows in what the step is made on.
            losses: [n, r] or [n].
        """
        finite = losses.detach().isfinite().view(len(rows), -1).all(-1)
        self.judged.append(Judged(rows, batch.columns, finite))

    def log_notes(self) -> None:
        """Logs what was noted since the last time."""
        if self.notes:
            totals, numbers = self.over_ranks(torch.stack([*self.notes.values()])).unbind(-1)
            means = totals / numbers.clamp(min=1.0)
            self.log_dict(dict(zip(self.notes, means, strict=True)))
            self.notes = {}

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def log_means(self, means: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Logs the mean of each (values, mask) over the True of all ranks, in one reduction."""
        sums = [
            torch.stack([torch.where(mask, values.float(), 0.0).sum(), mask.sum().float()])
            for values, mask in means.values()
        ]
        for name, (total, number) in zip(means, self.over_ranks(torch.stack(sums)), strict=True):
            self.log(name, total / number.clamp(min=1.0), batch_size=1)

    def measure(self, batch: AnyBatch, **means: tuple[Tensor, Tensor]) -> None:
        """Adds (values, mask or weights) of one evaluation batch to the means of its epoch.

        Rows that only fill up the last round of the ranks (`counted` False) are left out.
        """
        counted = torch.tensor(batch.counted, device=self.device)
        for name, (values, mask) in means.items():
            if name not in self.means:
                self.means[name] = MeanMetric().to(self.device).set_dtype(torch.float32)
            rows = counted.view(-1, *[1] * (mask.ndim - 1))
            self.means[name].update(values.float().where(mask > 0, 0.0), (mask * rows).float())

    def evaluation(self) -> dict[str, Tensor]:
        """The means over all rows of all ranks, by name, and a fresh start."""
        means = {name: metric.compute() for name, metric in self.means.items()}
        self.means.clear()
        return means

    def on_validation_epoch_end(self) -> None:
        """Logs what the validation measured."""
        self.log_dict({f"val/{name}": value for name, value in self.evaluation().items()})

    def on_test_epoch_end(self) -> None:
        """Logs what the test measured."""
        self.log_dict({f"test/{name}": value for name, value in self.evaluation().items()})


LIGHTER = "or train adapters (--config lora), or shard over more GPUs (--config fsdp)."
ADVICE = {  # what to change when memory runs out, by phase
    "load": f"Out of memory in phase load: set --model.policy.dtype bfloat16, {LIGHTER}",
    "rollout": "Out of memory in phase rollout: lower --data.batch_size, --model.num_samples or "
    "--rollout.max_new_tokens.",
    "score": "Out of memory in phase score: lower --reward.sources.tokens_per_pass, take a smaller "
    "reward model, or --data.batch_size.",
    "prepare": f"Out of memory in phase prepare: lower --model.microbatch_tokens, {LIGHTER}",
    "update": "Out of memory in phase update: lower --model.microbatch_tokens, set "
    "--model.policy.checkpointing true, or train adapters (--config lora).",
}

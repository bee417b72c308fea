"""What the policy said: completions as JSON lines in the run folder."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.runs.atomic_io import write_whole


class Samples(Callback):
    """Writes `completions/rollout_00010.jsonl` while training, and `predictions.jsonl`.

    The first rollout has a file, too. Each validation leaves its first answers, of the same prompts
    each time, in `completions/held_out_00010.jsonl`; number 0 is before training, of the prompts
    that Lightning's sanity check asks. Files are written whatever the logger is; Weights & Biases
    gets the first rank's rollouts as a table as well.

    Each line has the data set's columns, the completion, its score and its length in tokens, and
    where stored answers are among the rows, whether it is one (`stored`); predictions also have the
    nats by which the policy exceeds the reference (`kl`). With several ranks each writes a file of
    its own.

    Args:
        every: Rollouts between two files while training, 0 for none.
        held_out: Answers of a validation that are kept on each rank, 0 for none.
    """

    def __init__(self, every: int = 10, held_out: int = 64):
        self.every, self.held_out = every, held_out
        self.validated: list[dict[str, Any]] = []  # answers of the validation under way

    def on_train_batch_end(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        outputs: Any,
        batch: Experience,
        batch_idx: int,
    ) -> None:
        """Writes the rollout just learnt from."""
        if not self.every or (algorithm.iteration % self.every and algorithm.iteration != 1):
            return
        rows = table(batch)
        self.keep(trainer, f"rollout_{algorithm.iteration:05d}", rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.log_table("completions", [*rows[0]], cells(rows), step=trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        outputs: Any,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the first answers; rows that only fill up the last round are left out."""
        rows = [row for row, real in zip(table(batch), batch.counted, strict=True) if real]
        self.validated += rows[: self.held_out - len(self.validated)]

    def on_validation_end(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Writes them, once per iteration: a resumed run's sanity check is no new answer."""
        rows, self.validated = self.validated, []
        if (
            rows
            and trainer.state.fn == "fit"
            and not (trainer.sanity_checking and trainer.ckpt_path)
        ):
            self.keep(trainer, f"held_out_{algorithm.iteration:05d}", rows)

    def on_predict_start(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Begins an empty file."""
        self.path(trainer, Path("predictions")).write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        outputs: Experience,
        batch: Experience,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the batch's answers; rows that only fill up the last round are left out."""
        rows = table(outputs, kl=algorithm.sequence_kl(outputs).tolist())
        counted = [row for row, real in zip(rows, outputs.counted, strict=True) if real]
        with self.path(trainer, Path("predictions")).open("a", encoding="utf-8") as file:
            file.write(self.lines(counted))

    def keep(self, trainer: Trainer, name: str, rows: list[dict[str, Any]]) -> None:
        """Writes a table, whole or not at all."""
        write_whole(self.path(trainer, Path("completions") / name), self.lines(rows))

    def path(self, trainer: Trainer, name: Path) -> Path:
        """The file of this rank."""
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        path = Path(trainer.default_root_dir) / f"{name}{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def lines(self, rows: list[dict[str, Any]]) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def table(batch: Experience, **more: list[Any]) -> list[dict[str, Any]]:
    """One dict per row: the columns, and what the callbacks measured."""
    fields = batch.fields()
    scores = {"score": batch.scores.tolist()} if "scores" in fields else {}
    stored = {"stored": batch.stored} if any(fields.get("stored", [])) else {}
    columns = {
        **batch.columns,
        **scores,
        "length": batch.response_lengths,
        "truncated": batch.truncated,
        "greedy": batch.greedy,
        **stored,
        **more,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Values of one type per column, as tables of a logger want them: numbers, or else text.

    Args:
        rows: As `table` has them.
    """
    texts = {
        name
        for row in rows
        for name, value in row.items()
        if not isinstance(value, int | float) and value is not None
    }
    return [
        [
            json.dumps(value, ensure_ascii=False, default=str)
            if name in texts and not isinstance(value, str)
            else value
            for name, value in row.items()
        ]
        for row in rows
    ]

"""What the policy said: completions as JSON lines in the run folder."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.runs.atomic_io import write_text_atomic


class ResponseLog(Callback):
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
        every_n_rollouts: Rollouts between two files while training, 0 for none.
        num_eval_samples: Answers of a validation that are kept on each rank, 0 for none.
    """

    def __init__(self, every_n_rollouts: int = 10, num_eval_samples: int = 64):
        self.every_n_rollouts, self.num_eval_samples = every_n_rollouts, num_eval_samples
        self.eval_rows: list[dict[str, Any]] = []  # answers of the validation under way

    def on_train_batch_end(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        outputs: Any,
        batch: Experience,
        batch_idx: int,
    ) -> None:
        """Writes the rollout just learnt from."""
        if not self.every_n_rollouts or (
            algorithm.iteration % self.every_n_rollouts and algorithm.iteration != 1
        ):
            return
        rows = response_rows(batch)
        self.write_rows(trainer, f"rollout_{algorithm.iteration:05d}", rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.log_table(
                    "completions", [*rows[0]], logger_cells(rows), step=trainer.global_step
                )

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
        rows = [row for row, real in zip(response_rows(batch), batch.is_new, strict=True) if real]
        self.eval_rows += rows[: self.num_eval_samples - len(self.eval_rows)]

    def on_validation_end(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Writes them, once per iteration: a resumed run's sanity check is no new answer."""
        rows, self.eval_rows = self.eval_rows, []
        if (
            rows
            and trainer.state.fn == "fit"
            and not (trainer.sanity_checking and trainer.ckpt_path)
        ):
            self.write_rows(trainer, f"held_out_{algorithm.iteration:05d}", rows)

    def on_predict_start(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Begins an empty file."""
        self.output_path(trainer, Path("predictions")).write_text("", encoding="utf-8")

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
        rows = response_rows(outputs, kl=algorithm.sequence_kl(outputs).tolist())
        new_rows = [row for row, real in zip(rows, outputs.is_new, strict=True) if real]
        with self.output_path(trainer, Path("predictions")).open("a", encoding="utf-8") as file:
            file.write(self.to_json_lines(new_rows))

    def write_rows(self, trainer: Trainer, name: str, rows: list[dict[str, Any]]) -> None:
        """Writes a table, whole or not at all."""
        write_text_atomic(
            self.output_path(trainer, Path("completions") / name), self.to_json_lines(rows)
        )

    def output_path(self, trainer: Trainer, name: Path) -> Path:
        """The file of this rank."""
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        path = Path(trainer.default_root_dir) / f"{name}{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def to_json_lines(self, rows: list[dict[str, Any]]) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def response_rows(batch: Experience, **extra: list[Any]) -> list[dict[str, Any]]:
    """One dict per row: the columns, and what the callbacks measured."""
    fields = batch.fields()
    scores = {"score": batch.scores.tolist()} if "scores" in fields else {}
    offline = {"stored": batch.is_offline} if any(fields.get("is_offline", [])) else {}
    columns = {
        **batch.columns,
        **scores,
        "length": batch.response_lengths,
        "truncated": batch.truncated,
        "greedy": batch.is_greedy,
        **offline,
        **extra,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def logger_cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Values of one type per column, as tables of a logger want them: numbers, or else text.

    Args:
        rows: As `response_rows` has them.
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

"""Log of responses as JSON lines in the run folder."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.batches import Experience
from lit_align.runs.atomic_io import write_text_atomic


class ResponseLog(Callback):
    """Write responses to `completions/rollout_00010.jsonl` and `predictions.jsonl`.

    The first rollout is also written. Each validation writes its first responses, always of the
    same prompts, to `completions/held_out_00010.jsonl`. Number 0 is before training, from
    Lightning's sanity check. Each rank writes its own file. Weights & Biases also gets the first
    rank's rollouts as a table.

    A line has the columns of the data set, the completion, its score and its length in tokens. With
    offline responses, `stored` is true for those. Predictions also have `kl`, the log-ratio of
    policy and reference in nats per response.

    Args:
        every_n_rollouts: Rollouts between two files in training. 0 writes none.
        num_eval_samples: Responses per validation and rank that are written. 0 writes none.
    """

    def __init__(self, every_n_rollouts: int = 10, num_eval_samples: int = 64):
        self.every_n_rollouts, self.num_eval_samples = every_n_rollouts, num_eval_samples
        self.eval_rows: list[dict[str, Any]] = []  # of the current validation

    def on_train_batch_end(
        self,
        trainer: Trainer,
        algorithm: OnlineAlgorithm,
        outputs: Any,
        batch: Experience,
        batch_idx: int,
    ) -> None:
        """Write the rollout of this iteration if it is due."""
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
        """Collect the first responses, without repeated rows."""
        rows = [row for row, new in zip(response_rows(batch), batch.is_new, strict=True) if new]
        self.eval_rows += rows[: self.num_eval_samples - len(self.eval_rows)]

    def on_validation_end(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Write the collected responses, except in the sanity check of a resumed run."""
        rows, self.eval_rows = self.eval_rows, []
        if (
            rows
            and trainer.state.fn == "fit"
            and not (trainer.sanity_checking and trainer.ckpt_path)
        ):
            self.write_rows(trainer, f"held_out_{algorithm.iteration:05d}", rows)

    def on_predict_start(self, trainer: Trainer, algorithm: OnlineAlgorithm) -> None:
        """Start with an empty file."""
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
        """Append the responses of a batch, without repeated rows."""
        rows = response_rows(outputs, kl=algorithm.sequence_kl(outputs).tolist())
        new_rows = [row for row, new in zip(rows, outputs.is_new, strict=True) if new]
        with self.output_path(trainer, Path("predictions")).open("a", encoding="utf-8") as file:
            file.write(self.to_json_lines(new_rows))

    def write_rows(self, trainer: Trainer, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a file of `completions/` atomically.

        Args:
            trainer: Trainer of the run.
            name: Name of the file without rank and suffix.
            rows: One dictionary per line.
        """
        write_text_atomic(
            self.output_path(trainer, Path("completions") / name), self.to_json_lines(rows)
        )

    def output_path(self, trainer: Trainer, name: Path) -> Path:
        """Return the path of this rank's file, and make its folder.

        Args:
            trainer: Trainer of the run.
            name: Path in the run folder without rank and suffix.
        """
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        path = Path(trainer.default_root_dir) / f"{name}{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def to_json_lines(self, rows: list[dict[str, Any]]) -> str:
        r"""Return one JSON object per line.

        Example:
            >>> ResponseLog().to_json_lines([{"score": 0.5}, {"score": 1}])
            '{"score": 0.5}\n{"score": 1}\n'
        """
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def response_rows(batch: Experience, **extra: list[Any]) -> list[dict[str, Any]]:
    """Return a dictionary per row: columns, score, length and flags of the response.

    Args:
        batch: N responses.
        **extra: Other columns, N values each.

    Example:
        >>> batch = Experience(
        ...     {"prompt": ["a"]}, response_lengths=[2], truncated=[False], is_greedy=[True]
        ... )
        >>> response_rows(batch, kl=[0.5])
        [{'prompt': 'a', 'length': 2, 'truncated': False, 'greedy': True, 'kl': 0.5}]
    """
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
    """Return the cells of a table with one type per column: numbers, or else text.

    Args:
        rows: Rows from `response_rows`.

    Example:
        >>> logger_cells([{"answer": 3, "score": 1}, {"answer": "c", "score": 0.5}])
        [['3', 1], ['c', 0.5]]
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

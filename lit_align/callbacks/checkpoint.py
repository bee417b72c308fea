"""Checkpoints between two iterations, from which a run resumes bit by bit."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.algorithms.core.base import Algorithm
from lit_align.errors import UserError
from lit_align.renamed import renamed_log_key
from lit_align.runs import checkpoint_files as files
from lit_align.runs import rng_state
from lit_align.runs.atomic_io import delete_path, partial_path, publish
from lit_align.runs.csv_log import ResumableCSVLogger
from lit_align.runs.optimizer_state_names import add_weight_names
from lit_align.runs.stop_signals import StopSignals


class Checkpoints(Checkpoint):
    """Save a run to `checkpoints/` between two iterations, at its end, and after a stop signal.

    A checkpoint is written after an iteration is validated and logged, and before the next one
    starts. Writes are atomic. Checkpoints of other runs in the folder are moved to
    `checkpoints/superseded/`, which `--ckpt_path last` ignores.

    Args:
        every_n_iterations: Iterations between two saves: rollouts, or optimizer steps of offline
            algorithms. 0 saves only at the end.
        keep_last: Number of newest checkpoints that are kept.
        monitor: Validation metric, such as val/reward. The best checkpoint by it is kept too.
            Default: no best checkpoint.
        mode: "max" if a higher monitor is better, "min" if a lower one is.
    """

    def __init__(
        self,
        every_n_iterations: int = 50,
        keep_last: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        if every_n_iterations < 0 or keep_last < 1:
            raise UserError(
                f"Checkpoints needs every_n_iterations >= 0 and keep_last >= 1, found "
                f"{every_n_iterations} and {keep_last}. Set both in the section of Checkpoints."
            )
        self.every_n_iterations, self.keep_last = every_n_iterations, keep_last
        self.monitor, self.mode = monitor, mode
        self.signals = StopSignals()
        self.loop_state: dict[str, Any] | None = None  # the loops' state after the last iteration
        self.is_saving = False
        self.last_saved: Path | None = None
        self.best: float | None = None  # value of `monitor`
        self.is_best = False  # True if the current weights have the best value
        self.rng_states: list[rng_state.RNGState] = []  # of a resumed run, by rank

    # When -----------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Install the signal handlers, after Lightning has set its own."""
        self.signals.install()

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Remove incomplete saves, and checkpoints and metrics after this run's iteration."""
        self.signals.install()
        self.loop_state, folder = None, files.checkpoint_folder(trainer.default_root_dir)
        source = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        is_same_folder = source is not None and source.parent == folder.resolve()
        num_done = algorithm.iteration if is_same_folder else 0
        self.last_saved = source
        if trainer.is_global_zero and not trainer.fast_dev_run:
            set_aside_foreign(folder, num_done)
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger):
                    logger.rewind(num_done)
        if source is not None:
            warn_if_finished(trainer, algorithm)

    def on_train_batch_start(
        self, trainer: Trainer, algorithm: Algorithm, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time. Restore the random number states before a resumed first iteration."""
        if self.loop_state is not None:
            self.between_iterations(trainer, algorithm)
        elif len(self.rng_states) == trainer.world_size:
            rng_state.set_rng_state(self.rng_states[trainer.global_rank])
        self.rng_states = []

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state of data and loops: Lightning fetches the next batch before the save."""
        self.loop_state, self.is_best = deepcopy(trainer.fit_loop.state_dict()), False

    def on_validation_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Compare the monitored metric with its best value so far."""
        if self.monitor is None or self.loop_state is None:
            return
        if self.monitor not in trainer.callback_metrics:
            raise UserError(unknown_monitor_message(self.monitor, [*trainer.callback_metrics]))
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.is_best = value, True

    def between_iterations(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save if it is time, and exit if any rank received a stop signal."""
        every = self.every_n_iterations
        is_requested = self.signals.received is not None
        stop = trainer.strategy.reduce_boolean_decision(is_requested, all=False)
        if stop or self.is_best or (every and algorithm.iteration % every == 0):
            self.save(trainer, algorithm)
        if stop:
            received = self.signals.received
            why = f" by {received.name}" if received is not None else ""
            rank_zero_only(print)(
                f"stopped{why} after iteration {algorithm.iteration}, saved as {self.last_saved}. "
                f"To resume, run the same command with --ckpt_path last."
            )
            self.signals.requeue(trainer)
            raise SystemExit(0)

    def on_train_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save the end of the run, unless no iteration was left."""
        if self.loop_state is not None:
            self.save(trainer, algorithm)
        self.signals.restore()

    def on_exception(
        self, trainer: Trainer, algorithm: LightningModule, exception: BaseException
    ) -> None:
        """Restore the previous signal handlers."""
        self.signals.restore()

    # How ------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Write the checkpoint of this iteration. A collective: every rank must call it."""
        if trainer.fast_dev_run:
            return
        folder = files.checkpoint_folder(trainer.default_root_dir)
        path = folder / files.checkpoint_name(algorithm.iteration)
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            files.delete_partial_files(folder)
        trainer.strategy.barrier("checkpoint folder")
        self.is_saving = True
        try:
            # all ranks write to the partial path; the name appears after the last of them
            trainer.save_checkpoint(partial_path(path), weights_only=False)
            if trainer.is_global_zero:
                publish(partial_path(path), path)
                if self.is_best:
                    files.write_best(folder, path)
                self.prune(folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            text = save_error_message(path, error, self.last_saved)
            if text is None:
                raise
            raise UserError(text) from error
        self.is_saving = False
        trainer.strategy.barrier("checkpoint")
        self.last_saved, self.is_best = path, False

    def prune(self, folder: Path) -> None:
        """Delete all checkpoints but the newest ones and the best one."""
        best = files.read_best(folder)
        for path in files.list_checkpoints(folder)[: -self.keep_last]:
            if path != best:
                delete_path(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value so far."""
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: Trainer, algorithm: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add number of ranks, random number states and weight names. Every rank must call it."""
        if self.is_saving:
            checkpoint["loops"]["fit_loop"] = self.loop_state
        checkpoint["num_ranks"] = trainer.world_size
        checkpoint["generators"] = rng_state.gather_rng_states()
        checkpoint["optimizer_states"] = add_weight_names(trainer, checkpoint["optimizer_states"])

    def on_load_checkpoint(
        self, trainer: Trainer, algorithm: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Print which states are lost if the number of ranks has changed."""
        self.rng_states, ranks = checkpoint.get("generators", []), checkpoint.get("num_ranks", 0)
        if trainer.training and ranks not in (0, trainer.world_size):
            rank_zero_only(print)(
                f"saved on {ranks} rank(s), resumed on {trainer.world_size}: weights, optimizer "
                f"and position in the data are restored. The random number states of Python, numpy "
                f"and torch are not. A batch of all ranks has data.batch_size x ranks rows: set "
                f"--data.batch_size to keep its size."
            )


def save_error_message(path: Path, error: BaseException, last_saved: Path | None) -> str | None:
    """Delete incomplete files and return a message, or return None for other errors.

    Args:
        path: Checkpoint that could not be written.
        error: Error of the save.
        last_saved: Previous checkpoint.
    """
    if not files.is_write_error(error):
        return None
    free = shutil.disk_usage(path.parent).free / 2**20
    files.delete_partial_files(path.parent)
    return (
        f"{path} could not be written; {free:,.1f} MiB were free on its disk. The incomplete "
        f"file was deleted. Last checkpoint: {last_saved or 'none yet'}. Free disk space and "
        f"resume with --ckpt_path last."
    )


def unknown_monitor_message(monitor: str, names: list[str]) -> str:
    """Return what to set in the place of a monitor that is not logged.

    Args:
        monitor: Metric that Checkpoints monitors.
        names: Metrics that are logged.

    Example:
        >>> unknown_monitor_message("val/objective/kl", ["val/kl/per_response_k1"])
        'val/objective/kl was renamed to val/kl/per_response_k1. Set monitor of Checkpoints.'
        >>> unknown_monitor_message("val/x", ["val/loss"])
        'monitor of Checkpoints must be a logged metric, found val/x. Set it to one of val/loss.'
    """
    sentence = renamed_log_key(monitor)
    if sentence is not None:
        return f"{sentence} Set monitor of Checkpoints."
    return (
        f"monitor of Checkpoints must be a logged metric, found {monitor}. Set it to one of "
        f"{', '.join(sorted(names))}."
    )


def set_aside_foreign(folder: Path, num_done: int) -> None:
    """Delete incomplete saves, and move checkpoints of another run.

    A checkpoint of a later iteration than the current one is from another run.

    Args:
        folder: Folder of the checkpoints.
        num_done: Number of iterations that the run has finished. 0 for a new run.
    """
    files.delete_partial_files(folder)
    foreign = [
        path for path in files.list_checkpoints(folder) if files.parse_iteration(path) > num_done
    ]
    if foreign:
        files.move_to_superseded(foreign, folder)
        print(
            f"{len(foreign)} checkpoint(s) of an earlier run, such as {foreign[-1].name}, were "
            f"moved to {folder / files.SUPERSEDED}"
        )


def warn_if_finished(trainer: Trainer, algorithm: Algorithm) -> None:
    """Print how to extend a run that has reached max_epochs or max_steps."""
    epochs, steps = trainer.fit_loop.epoch_progress.current.processed, trainer.global_step
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs
    by_steps = 0 <= trainer.max_steps <= steps
    if by_epochs or by_steps:
        name = "max_epochs" if by_epochs else "max_steps"
        rank_zero_only(print)(
            f"this run is finished: {algorithm.iteration} iterations, {name} "
            f"{getattr(trainer, name)}. Raise --trainer.{name} to extend it."
        )

"""When a run is saved, and that it goes on from there as if it had never stopped."""

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
from lit_align.runs import checkpoint_files as files
from lit_align.runs import rng_state
from lit_align.runs.csv_log import ResumableCSVLogger
from lit_align.runs.optimizer_state_names import add_weight_names
from lit_align.runs.stop_signals import StopSignals


class Checkpoints(Checkpoint):
    """Saves the run into `checkpoints/` between two iterations, and when it ends or is told to.

    A checkpoint is written before the next iteration begins, when all of the last one is done,
    validated and logged. It appears whole or not at all. What lies in the folder and is not of this
    run's past is moved to `checkpoints/superseded/`, so that `--ckpt_path last` never means it.

    Args:
        every_n_iterations: Iterations (rollouts, or optimizer steps of offline algorithms) between
            two saves; 0 saves at the end alone.
        keep_last: How many of the newest checkpoints are kept.
        monitor: Metric of the validation, such as val/reward, by which the best one is kept, too;
            by default none is.
        mode: max if a higher monitor is better, min if a lower one is.
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
                f"{every_n_iterations} and {keep_last}."
            )
        self.every_n_iterations, self.keep_last = every_n_iterations, keep_last
        self.monitor, self.mode = monitor, mode
        self.signals = StopSignals()
        self.loop_state: dict[str, Any] | None = None  # the loops' state after the last iteration
        self.is_saving = False
        self.last_saved: Path | None = None
        self.best: float | None = None  # value of `monitor`
        self.is_best = False  # the weights as they are now
        self.rng_states: list[rng_state.RNGState] = []  # by rank, to be restored

    # When -----------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, algorithm: LightningModule) -> None:
        """Takes the signals over as soon as Lightning has set its own handlers."""
        self.signals.install()

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Clears what is not of this run's past: half a save, later checkpoints, later metrics."""
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
        """The border between two iterations; a resumed run gets its random numbers back."""
        if self.loop_state is not None:
            self.between_iterations(trainer, algorithm)
        elif len(self.rng_states) == trainer.world_size:
            rng_state.set_rng_state(self.rng_states[trainer.global_rank])
        self.rng_states = []

    def on_train_batch_end(
        self, trainer: Trainer, algorithm: Algorithm, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes where data and loops are: at the border the next batch is fetched already."""
        self.loop_state, self.is_best = deepcopy(trainer.fit_loop.state_dict()), False

    def on_validation_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Compares the monitored metric with its best value so far."""
        if self.monitor is None or self.loop_state is None:
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"Checkpoints monitors {self.monitor}, but there are only {names}.")
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.is_best = value, True

    def between_iterations(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Saves if it is time; leaves if a rank was told to."""
        every = self.every_n_iterations
        is_requested = self.signals.received is not None
        stop = trainer.strategy.reduce_boolean_decision(is_requested, all=False)
        if stop or self.is_best or (every and algorithm.iteration % every == 0):
            self.save(trainer, algorithm)
        if stop:
            received = self.signals.received
            why = f" by {received.name}" if received is not None else ""
            rank_zero_only(print)(
                f"stopped{why} after iteration {algorithm.iteration}, saved as {self.last_saved}; "
                f"to go on, run the same command with --ckpt_path last"
            )
            self.signals.requeue(trainer)
            raise SystemExit(0)

    def on_train_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Saves the end of the run, unless there was nothing left to do."""
        if self.loop_state is not None:
            self.save(trainer, algorithm)
        self.signals.restore()

    def on_exception(
        self, trainer: Trainer, algorithm: LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back."""
        self.signals.restore()

    # How ------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Writes the checkpoint of this iteration; every rank takes part."""
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
            trainer.save_checkpoint(files.partial_path(path), weights_only=False)
            if trainer.is_global_zero:
                files.publish(files.partial_path(path), path)
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
        """Deletes all but the newest checkpoints and the best one."""
        best = files.read_best(folder)
        for path in files.list_checkpoints(folder)[: -self.keep_last]:
            if path != best:
                files.delete_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on comparing with it."""
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: Trainer, algorithm: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what Lightning leaves out; every rank takes part."""
        if self.is_saving:
            checkpoint["loops"]["fit_loop"] = self.loop_state
        checkpoint["num_ranks"] = trainer.world_size
        checkpoint["generators"] = rng_state.gather_rng_states()
        checkpoint["optimizer_states"] = add_weight_names(trainer, checkpoint["optimizer_states"])

    def on_load_checkpoint(
        self, trainer: Trainer, algorithm: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Says what another number of ranks cannot keep."""
        self.rng_states, ranks = checkpoint.get("generators", []), checkpoint.get("num_ranks", 0)
        if trainer.training and ranks not in (0, trainer.world_size):
            rank_zero_only(print)(
                f"saved on {ranks} rank(s), resumed on {trainer.world_size}: weights, optimizer "
                f"and the place in the data are kept; python's, numpy's and torch's random numbers "
                f"of each rank are not, and a batch of all ranks is data.batch_size times the "
                f"number of ranks, so that steps have another size unless you change it"
            )


def save_error_message(path: Path, error: BaseException, last_saved: Path | None) -> str | None:
    """Deletes what is half-written, and says so; None where writing is not what failed.

    Args:
        path: The checkpoint that was to be.
        error: What came instead.
        last_saved: The one before.
    """
    if not files.is_write_error(error):
        return None
    free = shutil.disk_usage(path.parent).free / 2**20
    files.delete_partial_files(path.parent)
    return (
        f"{path} could not be written; {free:,.1f} MiB were free on its disk. What was "
        f"half-written is deleted. Last checkpoint: {last_saved or 'none yet'}. Make room, and go "
        f"on with --ckpt_path last."
    )


def set_aside_foreign(folder: Path, num_done: int) -> None:
    """Deletes half a save, and sets aside what is not of a run's past.

    Args:
        folder: Of the checkpoints.
        num_done: Iterations that the run has behind it.
    """
    files.delete_partial_files(folder)
    foreign = [
        path for path in files.list_checkpoints(folder) if files.parse_iteration(path) > num_done
    ]
    if foreign:
        files.move_to_superseded(foreign, folder)
        print(
            f"{len(foreign)} checkpoint(s) of an earlier run, such as {foreign[-1].name}, are now "
            f"in {folder / files.SUPERSEDED}"
        )


def warn_if_finished(trainer: Trainer, algorithm: Algorithm) -> None:
    """A run that is at its end does nothing more, and how it can be made longer."""
    epochs, steps = trainer.fit_loop.epoch_progress.current.processed, trainer.global_step
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs
    by_steps = 0 <= trainer.max_steps <= steps
    if by_epochs or by_steps:
        name = "max_epochs" if by_epochs else "max_steps"
        rank_zero_only(print)(
            f"this run is finished: {algorithm.iteration} iterations, {name} "
            f"{getattr(trainer, name)}; to extend it, raise --trainer.{name}"
        )

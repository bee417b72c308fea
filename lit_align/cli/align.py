"""The training command: LightningCLI with the sections `rollout` and `reward`."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.callbacks.config_writer import ConfigWriter
from lit_align.callbacks.curves import Curves
from lit_align.callbacks.environment import EnvironmentLog
from lit_align.callbacks.export import Export
from lit_align.callbacks.memory import Memory
from lit_align.callbacks.nan_guard import NonFiniteGuard
from lit_align.callbacks.out_of_memory import OutOfMemoryAdvice
from lit_align.callbacks.progress import Progress
from lit_align.callbacks.response_log import ResponseLog
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.callbacks.run_summary import RunSummary
from lit_align.callbacks.timing import Timing
from lit_align.cli.errors import one_line, run_folder_message
from lit_align.cli.mistakes import resolve_class, unknown_class
from lit_align.cli.resume import resolve_checkpoint
from lit_align.cli.settings_parser import SettingsParser
from lit_align.data.base import TextDataModule
from lit_align.errors import UserError
from lit_align.runs.checkpoint_io import AtomicCheckpointIO
from lit_align.runs.csv_log import ResumableCSVLogger

DEVICES = " --trainer.accelerator auto and --trainer.devices auto take what this machine has."


class AlignCLI(LightningCLI):
    """Parse the settings, order the callbacks, and run the Trainer.

    Args:
        args: The command line without the program's name, its configs read.
        argv: The command line as the user typed it. Default: empty, for a script.
    """

    def __init__(self, args: list[str], argv: list[str] | None = None):
        self.argv = tuple(argv or ())
        try:
            self.parse_and_run(args)
        except OSError as error:
            folder = self.run_folder()
            text = None if folder is None else run_folder_message(error, folder)
            if text is None:
                raise
            raise UserError(text) from error

    def parse_and_run(self, args: list[str]) -> None:
        """Parse the settings, build the objects, and run the command of Lightning's Trainer.

        Args:
            args: The command line without the program's name, its configs read.
        """
        super().__init__(
            Algorithm,
            TextDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=SettingsParser,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=ConfigWriter,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs/last",
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,  # `Progress` prints lines instead
            },
        )

    def run_folder(self) -> Path | None:
        """Return the run folder, or None before the settings are parsed."""
        config = getattr(self, "config", None)
        if config is None or config.get("subcommand") is None:
            return None
        return Path(config[config.subcommand].trainer.default_root_dir)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections that only online algorithms have."""
        rollout = "How responses are generated. Only for online algorithms."
        reward = "How responses are scored. Only for online algorithms."
        parser.add_argument("--rollout", type=Rollout | None, default=None, help=rollout)
        parser.add_argument("--reward", type=Reward | None, default=None, help=reward)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`; LightningCLI 2.6 would warn that they are not `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Fill in settings that depend on others, and refuse unsupported settings."""
        config = self.config[self.config.subcommand]
        if config.trainer.get("gradient_clip_val") is not None:
            raise UserError(
                "--trainer.gradient_clip_val is not supported. Set --model.max_grad_norm, which "
                "clips the gradient of each role."
            )
        if config.trainer.get("accumulate_grad_batches") not in (None, 1):
            raise UserError(
                "--trainer.accumulate_grad_batches is not supported. Set --data.batch_size to the "
                "rows of one step and --model.microbatch_tokens to what fits in memory."
            )
        self.check_strategy(config)
        if config.data is not None and config.data.init_args.get("tokenizer") is None:
            config.data.init_args.tokenizer = self.model_path(config.model.init_args)
        self.checkpoint = resolve_checkpoint(config, self.config.subcommand == "fit")
        if self.config.subcommand == "predict":
            config.return_predictions = False

    def check_strategy(self, config: Namespace) -> None:
        """Read the names of FSDP as FSDP2. `Algorithm.setup` refuses Lightning's FSDPStrategy."""
        strategy = config.trainer.get("strategy")
        if isinstance(strategy, str) and "." in strategy:
            # jsonargparse 4.53 reads a class path as a name, since the type has both
            if resolve_class(Strategy, strategy) is None:
                raise UserError(unknown_class("--trainer.strategy", Strategy, strategy))
            config.trainer.strategy = Namespace(class_path=strategy, init_args=Namespace())
        if strategy in ("fsdp", "fsdp_cpu_offload"):
            config.trainer.strategy = strategy.replace("fsdp", "fsdp2")
            rank_zero_only(print)(
                f"--trainer.strategy {strategy} is read as {config.trainer.strategy}: PyTorch's "
                f"FSDP2 (lit_align.models.parallel.fsdp2.FSDP2)."
            )

    def model_path(self, model: Namespace) -> str | None:
        """Return the path of the first network that has one, for its tokenizer."""
        for role in ("policy", "reward_model"):
            settings = (model.get(role) or Namespace()).get("init_args") or Namespace()
            if settings.get("path") is not None:
                return str(settings.path)
        return None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer: checkpoints and timing first, then sections, then writers."""
        config = self.config_init[self.config_init.subcommand]
        folder = Path(config.trainer.default_root_dir)
        fitting = self.config_init.subcommand == "fit"
        if not fitting:  # the records of a fit in this folder stay
            self.save_config_callback, kwargs["logger"] = None, False
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = [
                ResumableCSVLogger(folder),
                TensorBoardLogger(folder, name="", version=""),
            ]
        self.check_sections(config)
        kwargs |= self.checkpoint_arguments(config)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            own = (config.trainer.accelerator, config.trainer.devices) != ("auto", "auto")
            hint = DEVICES if own else ""
            raise UserError(f"{one_line(str(error))}{hint}") from error
        given_types = {type(callback) for callback in trainer.callbacks}
        sections = [section for section in (config.rollout, config.reward) if section is not None]
        writers = [
            RunSummary(),
            EnvironmentLog(self.argv),
            NonFiniteGuard(),
            OutOfMemoryAdvice(),
            Progress(),
            Curves(),
            Export(),
            *([ResponseLog()] if sections else []),
        ]
        writers = [writer for writer in writers if type(writer) not in given_types]
        first: list[Callback] = [
            each for each in trainer.callbacks if isinstance(each, Checkpoints | Memory)
        ]
        others = [each for each in trainer.callbacks if each not in first]
        first += [kind() for kind in self.phase_callbacks(trainer) if kind not in given_types]
        # checkpoints first: one is saved before the rollout of the next iteration starts
        trainer.callbacks[:] = [*first, *sections, *others, *writers]
        return trainer

    def phase_callbacks(self, trainer: Trainer) -> list[type[Callback]]:
        """Return the callbacks that measure phases; on a CPU counting memory takes time."""
        is_free = trainer.strategy.root_device.type != "cpu"
        return [Timing, Memory] if is_free else [Timing]

    def checkpoint_arguments(self, config: Namespace) -> dict[str, Any]:
        """Return the trainer's callbacks and plugins with this package's checkpoints added.

        Args:
            config: Settings of the command.
        """
        config.ckpt_path, config.weights_only = self.checkpoint, True
        callbacks: list[Callback] = as_list(config.trainer.callbacks)
        plugins: list[Any] = as_list(config.trainer.plugins)
        if config.trainer.enable_checkpointing is not False:
            has_checkpoint = any(isinstance(each, Checkpoint) for each in callbacks)
            callbacks = callbacks if has_checkpoint else [*callbacks, Checkpoints()]
        if not any(isinstance(each, CheckpointIO) for each in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        if self.checkpoint is not None:
            self.save_config_kwargs["previous"] = Path(self.checkpoint).parents[1] / "config.yaml"
        return {"callbacks": callbacks, "plugins": plugins}

    def check_sections(self, config: Namespace) -> None:
        """Refuse an online algorithm without a section for responses or for scores."""
        name = type(self.model).__name__
        if isinstance(self.model, OnlineAlgorithm) and config.rollout is None:
            raise UserError(f"{name} is trained on its own responses. Add a `rollout` section.")
        if isinstance(self.model, OnlineAlgorithm) and config.reward is None:
            raise UserError(f"{name} is trained on scores. Add a `reward` section.")

    def _parse_ckpt_path(self) -> None:
        """Keep the command line: LightningCLI 2.6 would let settings of a checkpoint replace it."""


class ExportCLI(AlignCLI):
    """Parse and build a run, and start nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Start nothing (LightningCLI 2.6 has no public switch in subcommand mode)."""


def as_list(value: Any) -> list[Any]:
    """Return None as [], and a single value as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

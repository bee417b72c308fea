"""Find the checkpoint of `--ckpt_path`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from lit_align.errors import UserError
from lit_align.runs.checkpoint_files import (
    checkpoint_folder,
    newest_readable,
    read_best,
    read_header,
)

COMMAND_SETTINGS = ("ckpt_path", "weights_only", "trainer.default_root_dir")  # not of a run


def resolve_checkpoint(config: Namespace, fitting: bool) -> str | None:
    """Return the checkpoint of `--ckpt_path`; `last` and `best` are looked up in the run folder.

    Args:
        config: Settings of the command.
        fitting: True for `fit`, where `last` may not exist yet.
    """
    ckpt_path, folder = config.get("ckpt_path"), checkpoint_folder(config.trainer.default_root_dir)
    if ckpt_path is None:
        return None
    if ckpt_path == "hpc" or (
        ckpt_path in ("last", "best") and "ModelCheckpoint" in str(config.trainer.callbacks)
    ):
        return str(ckpt_path)  # for Lightning to look up
    if ckpt_path not in ("last", "best"):
        if not Path(ckpt_path).exists():
            raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint.")
        read_header(Path(ckpt_path))
        return str(ckpt_path)
    path, messages = (read_best(folder), []) if ckpt_path == "best" else newest_readable(folder)
    for message in messages:
        rank_zero_only(print)(f"{message} Using the one before it.")
    if path is None and not (fitting and ckpt_path == "last"):
        raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint in {folder}.")
    if path is None:
        rank_zero_only(print)(
            f"--ckpt_path last: no checkpoint in {folder} yet; the run starts from the beginning"
        )
        return None
    iteration = read_header(path)["iteration"]
    verb = "resuming from" if fitting else "loading"
    rank_zero_only(print)(f"--ckpt_path {ckpt_path}: {verb} {path}, iteration {iteration}")
    return str(path)


class ConfigWriter(SaveConfigCallback):
    """Writes `config.yaml`; a resumed run lists what differs from the one it goes on from.

    Args:
        previous: The config of the run that is resumed.
        settings: Lightning's.
    """

    def __init__(self, *settings: Any, previous: Path | None = None, **kwargs: Any):
        super().__init__(*settings, **kwargs)
        self.previous = previous

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Compares before it overwrites."""
        if self.previous is not None and self.previous.is_file() and trainer.is_global_zero:
            new = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for line in diff_configs(yaml.safe_load(self.previous.read_text()), new):
                print(line)
        try:
            super().setup(trainer, algorithm, stage)
        except OSError:  # half of it would be read back as if it were all
            (Path(trainer.default_root_dir) / "config.yaml").unlink(missing_ok=True)
            raise


def diff_configs(previous: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each setting that is another now."""
    old, new = dict(flatten_config(previous)), dict(flatten_config(after))
    for name in {**old, **new}:
        if name not in COMMAND_SETTINGS and old.get(name) != new.get(name):
            short = name.replace(".init_args", "")
            yield f"changed: {short} was {old.get(name)}, is {new.get(name)}"


def flatten_config(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; empty sections are values."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flatten_config(value, f"{name}.{key}" if name else key)
    else:
        yield name, settings

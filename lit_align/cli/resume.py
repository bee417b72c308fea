"""Where a command goes on from, and what has been changed since."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from lit_align.runs.checkpoint_files import folder_of, head, newest, read_best

OF_A_COMMAND = ("ckpt_path", "weights_only", "trainer.default_root_dir")  # not of a run


def found_checkpoint(config: Namespace, fitting: bool) -> str | None:
    """The checkpoint that `--ckpt_path` means; `last` and `best` are looked up in the run folder.

    Args:
        config: Of the command.
        fitting: Whether there may be none yet.
    """
    wanted, folder = config.get("ckpt_path"), folder_of(config.trainer.default_root_dir)
    if wanted is None:
        return None
    if wanted == "hpc" or (
        wanted in ("last", "best") and "ModelCheckpoint" in str(config.trainer.callbacks)
    ):
        return str(wanted)  # for Lightning to look up
    if wanted not in ("last", "best"):
        if not Path(wanted).exists():
            raise ValueError(f"--ckpt_path {wanted}: there is no such checkpoint.")
        head(Path(wanted))
        return str(wanted)
    path, complaints = (read_best(folder), []) if wanted == "best" else newest(folder)
    for complaint in complaints:
        rank_zero_only(print)(f"{complaint} Taking the one before it.")
    if path is None and not (fitting and wanted == "last"):
        raise ValueError(f"--ckpt_path {wanted}: there is no such checkpoint in {folder}.")
    if path is None:
        rank_zero_only(print)(f"--ckpt_path last: none in {folder} yet, so the run starts afresh")
        return None
    done = head(path)["iteration"]
    verb = "going on from" if fitting else "taking"
    rank_zero_only(print)(f"--ckpt_path {wanted}: {verb} {path}, iteration {done}")
    return str(path)


class RunConfig(SaveConfigCallback):
    """Writes `config.yaml`; a resumed run lists what differs from the one it goes on from.

    Args:
        before: The config of the run that is resumed.
        settings: Lightning's.
    """

    def __init__(self, *settings: Any, before: Path | None = None, **more: Any):
        super().__init__(*settings, **more)
        self.before = before

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Compares before it overwrites."""
        if self.before is not None and self.before.is_file() and trainer.is_global_zero:
            new = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for line in changes(yaml.safe_load(self.before.read_text()), new):
                print(line)
        try:
            super().setup(trainer, algorithm, stage)
        except OSError:  # half of it would be read back as if it were all
            (Path(trainer.default_root_dir) / "config.yaml").unlink(missing_ok=True)
            raise


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each setting that is another now."""
    old, new = dict(flat(before)), dict(flat(after))
    for name in {**old, **new}:
        if name not in OF_A_COMMAND and old.get(name) != new.get(name):
            short = name.replace(".init_args", "")
            yield f"changed: {short} was {old.get(name)}, is {new.get(name)}"


def flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; empty sections are values."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, settings

"""Writer of config.yaml, which also prints the settings that a resumed run changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_align.runs.run_folder import iterate_settings

COMMAND_SETTINGS = ("ckpt_path", "weights_only", "trainer.default_root_dir")  # not of a run


class ConfigWriter(SaveConfigCallback):
    """Write `config.yaml` to the run folder. A resumed run prints its changed settings first.

    Args:
        *settings: Arguments of Lightning's SaveConfigCallback.
        previous: config.yaml of the run that is resumed. Default: a new run.
        **kwargs: More arguments of SaveConfigCallback.
    """

    def __init__(self, *settings: Any, previous: Path | None = None, **kwargs: Any):
        super().__init__(*settings, **kwargs)
        self.previous = previous

    def setup(self, trainer: Trainer, algorithm: LightningModule, stage: str) -> None:
        """Print the changed settings, and then overwrite the file."""
        if self.previous is not None and self.previous.is_file() and trainer.is_global_zero:
            new = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for line in diff_configs(yaml.safe_load(self.previous.read_text()), new):
                print(line)
        try:
            super().setup(trainer, algorithm, stage)
        except OSError:  # half of a config would be valid YAML with fewer settings
            (Path(trainer.default_root_dir) / "config.yaml").unlink(missing_ok=True)
            raise


def diff_configs(previous: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each setting that differs. Settings of the command are left out.

    Args:
        previous: Nested settings of the run that is resumed.
        after: Nested settings of this run.

    Example:
        >>> list(diff_configs({"data": {"seed": 0}}, {"data": {"seed": 7}}))
        ['changed: data.seed was 0, is 7']
    """
    old, new = dict(iterate_settings(previous)), dict(iterate_settings(after))
    for name in {**old, **new}:
        if name not in COMMAND_SETTINGS and old.get(name) != new.get(name):
            short = name.replace(".init_args", "")
            yield f"changed: {short} was {old.get(name)}, is {new.get(name)}"

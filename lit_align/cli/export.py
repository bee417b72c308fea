"""`lit-align export`: turn a checkpoint into a folder that transformers loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lit_align.cli.argument_parser import ArgumentParser
from lit_align.errors import UserError

if TYPE_CHECKING:
    from lit_align.cli.align import ExportCLI

ABOUT = "Turn a checkpoint into a folder that transformers (or, for an adapter, peft) loads."
ONE_PROCESS = {  # settings of the trainer in the place of the run's
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "callbacks": None,
    "plugins": None,
    "logger": False,
}


def main(argv: list[str]) -> int:
    """Build the run's networks, load the checkpoint, and write the folders.

    Args:
        argv: The words after `export`.
    """
    options = build_parser().parse_args(argv)
    from lit_align.tools.export import export_checkpoint

    checkpoint = find_checkpoint(options.ckpt_path)
    config = options.config or checkpoint.parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: no such file. Set --config to the config.yaml of the run.")
    cli = build_run(config)
    with cli.trainer.init_module():
        cli.model.configure_model()
    run, out = config.parent, options.out
    for folder in export_checkpoint(cli.model, cli.datamodule, checkpoint, out, run, options.merge):
        print(f"wrote {folder}")
    return 0


def build_parser() -> ArgumentParser:
    """Return the parser of the words after `export`."""
    parser = ArgumentParser(prog="lit-align export", description=ABOUT)
    add = parser.add_argument
    add("--ckpt_path", type=Path, required=True, metavar="PATH",
        help="Checkpoint, or a run folder for its newest one.")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="Folder to write.")
    add("--config", type=Path, metavar="FILE",
        help="The run's config.yaml. Default: the one in the run folder.")  # fmt: skip
    add("--merge", action="store_true", help="Merge adapters into the weights, in float32.")
    return parser


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint's path, or the newest checkpoint of a run folder.

    Args:
        path: Checkpoint, or run folder.
    """
    from lit_align.runs.checkpoint_files import checkpoint_folder, newest_readable, read_header

    if not path.exists():
        raise UserError(f"--ckpt_path {path}: no such checkpoint.")
    if not checkpoint_folder(path).is_dir():
        read_header(path)
        return path
    checkpoint, messages = newest_readable(checkpoint_folder(path))
    if checkpoint is None:
        raise UserError(
            " ".join([f"There is no checkpoint in {checkpoint_folder(path)}.", *messages])
        )
    return checkpoint


def build_run(config: Path) -> ExportCLI:
    """Build the objects of a run in one process on the CPU.

    Args:
        config: The run's config.yaml.
    """
    from lit_align.cli.align import ExportCLI
    from lit_align.cli.discovery import import_all
    from lit_align.cli.errors import silence_known_warnings
    from lit_align.cli.overlays import read_config, to_inline_yaml

    silence_known_warnings()
    import_all()
    sys.path.insert(0, str(Path.cwd()))
    settings = read_config(str(config))
    settings["trainer"] = {**settings["trainer"], **ONE_PROCESS}
    settings["ckpt_path"] = None  # the checkpoint that the run itself was resumed from
    return ExportCLI(["predict", "--config", to_inline_yaml(settings)])

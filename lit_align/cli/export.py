"""`lit-align export`: a checkpoint as a folder that transformers loads."""

import sys
from pathlib import Path

from lit_align.cli.align import AlignCLI
from lit_align.cli.discovery import open_rooms
from lit_align.cli.errors import Parser, quieten
from lit_align.cli.overlays import inline, read
from lit_align.runs.checkpoint_files import folder_of, head, newest
from lit_align.tools.export import export

ALONE = {  # one process, whatever the run was
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "callbacks": None,
    "plugins": None,
    "logger": False,
}


def main(argv: list[str]) -> int:
    """Builds the run's networks, loads the checkpoint and writes the folders.

    Args:
        argv: The words behind `export`.
    """
    parser = Parser(prog="lit-align export", description=__doc__)
    parser.add_argument("--ckpt_path", type=str, help="Checkpoint, or a run's folder for its last.")
    parser.add_argument("--out", type=str, help="Folder to be written.")
    parser.add_argument(
        "--config", type=str | None, help="The run's config.yaml, if it is not in its folder."
    )
    parser.add_argument(
        "--merge", action="store_true", help="Write adapters into the weights, in float32."
    )
    given = parser.parse_args(argv)
    if given.ckpt_path is None or given.out is None:
        raise ValueError("export needs --ckpt_path, a checkpoint or a run's folder, and --out.")
    checkpoint = found_checkpoint(Path(given.ckpt_path))
    config = Path(given.config or checkpoint.parents[1] / "config.yaml")
    if not config.is_file():
        raise ValueError(f"{config}: no such file; give --config, the config.yaml of the run.")
    built = build(config)
    with built.trainer.init_module():
        built.model.configure_model()
    run, out = config.parent, Path(given.out)
    for folder in export(built.model, built.datamodule, checkpoint, out, run, given.merge):
        print(f"wrote {folder}")
    return 0


def found_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest of a run's folder."""
    if not path.exists():
        raise ValueError(f"--ckpt_path {path}: there is no such checkpoint.")
    if not folder_of(path).is_dir():
        head(path)
        return path
    found, complaints = newest(folder_of(path))
    if found is None:
        raise ValueError(" ".join([f"There is no checkpoint in {folder_of(path)}.", *complaints]))
    return found


class Built(AlignCLI):
    """Parses and builds, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Leaves the trainer alone."""


def build(config: Path) -> Built:
    """What the run was made of, in one process on the CPU."""
    quieten()
    open_rooms()
    sys.path.insert(0, str(Path.cwd()))
    settings = read(str(config))
    settings["trainer"] = {**settings["trainer"], **ALONE}
    settings["ckpt_path"] = None  # what the run itself went on from
    return Built(["predict", "--config", inline(settings)])

"""A checkpoint as folders that transformers loads without us."""

import math
from pathlib import Path

from lit_align.algorithms.core.base import Algorithm
from lit_align.data.base import TextDataModule
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.merge_adapter import merge_adapter
from lit_align.models.weights.loading import silence_transformers
from lit_align.models.weights.state_dict_check import check_state_dict, weight_shapes
from lit_align.runs.atomic_io import atomic_folder
from lit_align.runs.checkpoint_files import read_header
from lit_align.runs.checkpoint_io import load_trained_weights
from lit_align.runs.export import export_folders, remove_stale_files, write_stop_ids
from lit_align.runs.model_card import write_card


def export_checkpoint(
    algorithm: Algorithm,
    data: TextDataModule,
    checkpoint: Path,
    out: Path,
    run: Path,
    merge: bool = False,
) -> list[Path]:
    """Writes each trained network with tokenizer and card, as the end of a run does; the folders.

    Args:
        algorithm: As the run had it, with its networks built.
        data: Has the tokenizer.
        checkpoint: Of one file, or sharded.
        out: Folder for all.
        run: Folder of the run, for what the card tells.
        merge: Write adapters into their base's weights; each adapter becomes a model of its own.
    """
    load_checkpoint_weights(algorithm, checkpoint)
    written = []
    for network, target in export_folders(algorithm.roles, out).items():
        tokenizer = write_stop_ids(network, data)
        merges = merge and not network.saves_full_model
        with atomic_folder(target) as part:
            parts = save_merged(network, part) if merges else [part]
            if not merges:
                network.save(part)
            for folder in parts:
                tokenizer.save_pretrained(folder)
                write_card(folder, run, network, network.saves_full_model or merge)
            folders = [target / folder.relative_to(part) for folder in parts]
            for folder in folders:
                remove_stale_files(folder, network, is_full_model=merges)
        written += folders
    return written


def load_checkpoint_weights(algorithm: Algorithm, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into the networks, after a look at what they were trained on."""
    info, name = read_header(checkpoint), type(algorithm).__name__
    if info["algorithm"] != name:
        raise UserError(f"{checkpoint} is of a {info['algorithm']} run, and the config of {name}.")
    if algorithm.reference_model is not None:
        expected, frozen = info["frozen_fingerprint"], algorithm.reference_model.fingerprint
        if not math.isclose(expected, frozen, abs_tol=1e-6):
            raise UserError(
                f"The frozen weights are others than those that {checkpoint} was trained on: give "
                f"the config of that run, whose paths must hold the same weights."
            )
    weights = load_trained_weights(checkpoint)
    check_state_dict(algorithm, weight_shapes(weights))
    algorithm.load_state_dict(weights, strict=False)


def save_merged(network: Backbone, out: Path) -> list[Path]:
    """Writes a whole model for each adapter that trained; their folders.

    Args:
        network: Adapted.
        out: Folder of a single one; several get one each in it.
    """
    folders = []
    for adapter in network.trained_adapters:
        folder = out if len(network.trained_adapters) == 1 else out / adapter
        with silence_transformers():
            merge_adapter(network, adapter).save_pretrained(folder)
        folders.append(folder)
    return folders

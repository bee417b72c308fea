"""Turn a checkpoint into folders that transformers loads without lit_align."""

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
    """Write each trained network with its tokenizer and model card; return the folders.

    The folders are those that `fit` writes at its end.

    Args:
        algorithm: Algorithm of the run with its networks built. The checkpoint is loaded into it.
        data: Data module of the run, which has the tokenizer.
        checkpoint: File, or folder of a sharded checkpoint.
        out: Folder to write. Several networks get one subfolder each.
        run: Run folder, whose config and metrics the model card shows.
        merge: Merge each adapter into its base, and write one full model per adapter.
    """
    load_checkpoint_weights(algorithm, checkpoint)
    written = []
    for network, target in export_folders(algorithm.roles, out).items():
        tokenizer = write_stop_ids(network, data)
        merges = merge and not network.saves_full_model  # a full model has nothing to merge
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
    """Load the trained weights of a checkpoint, after checks of algorithm and frozen weights.

    Args:
        algorithm: Algorithm with its networks built.
        checkpoint: File, or folder of a sharded checkpoint.
    """
    info, name = read_header(checkpoint), type(algorithm).__name__
    if info["algorithm"] != name:
        raise UserError(
            f"{checkpoint} is from a run of {info['algorithm']}, and the config is for {name}. Set "
            f"--config to the config.yaml of that run."
        )
    if algorithm.reference_model is not None:
        expected, frozen = info["frozen_fingerprint"], algorithm.reference_model.fingerprint
        if not math.isclose(expected, frozen, abs_tol=1e-6):
            raise UserError(
                f"The frozen weights differ from those that {checkpoint} was trained with. Set "
                f"--config to the config.yaml of that run, with paths to the same weights."
            )
    weights = load_trained_weights(checkpoint)
    check_state_dict(algorithm, weight_shapes(weights))
    # a checkpoint has trained weights only, so strict loading would miss the frozen ones
    algorithm.load_state_dict(weights, strict=False)


def save_merged(network: Backbone, out: Path) -> list[Path]:
    """Write a full model for each trained adapter and return the folders.

    Args:
        network: Network with adapters.
        out: Folder of the model. Several adapters get one subfolder each.
    """
    folders = []
    for adapter in network.trained_adapters:
        folder = out if len(network.trained_adapters) == 1 else out / adapter
        with silence_transformers():
            merge_adapter(network, adapter).save_pretrained(folder)
        folders.append(folder)
    return folders

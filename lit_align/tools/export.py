"""A checkpoint as folders that transformers loads without us."""

import math
from pathlib import Path

from lit_align.algorithms.core.base import Algorithm
from lit_align.data.base import TextData
from lit_align.models.backbone import Backbone
from lit_align.models.merge_adapter import merged
from lit_align.models.weights.loading import quiet_transformers
from lit_align.models.weights.state_dict_check import check_fit, shapes
from lit_align.runs.atomic_io import whole_folder
from lit_align.runs.checkpoint_files import head
from lit_align.runs.checkpoint_io import trained_weights
from lit_align.runs.export import clear, name_ends, places
from lit_align.runs.model_card import write_card


def export(
    algorithm: Algorithm,
    data: TextData,
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
    load(algorithm, checkpoint)
    written = []
    for network, place in places(algorithm.roles, out).items():
        tokenizer = name_ends(network, data)
        merges = merge and not network.saved_whole
        with whole_folder(place) as part:
            parts = save_merged(network, part) if merges else [part]
            if not merges:
                network.save(part)
            for folder in parts:
                tokenizer.save_pretrained(folder)
                write_card(folder, run, network, network.saved_whole or merge)
            folders = [place / folder.relative_to(part) for folder in parts]
            for folder in folders:
                clear(folder, network, whole=merges)
        written += folders
    return written


def load(algorithm: Algorithm, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into the networks, after a look at what they were trained on."""
    found, name = head(checkpoint), type(algorithm).__name__
    if found["algorithm"] != name:
        raise ValueError(
            f"{checkpoint} is of a {found['algorithm']} run, and the config of {name}."
        )
    if algorithm.reference_model is not None:
        expected, frozen = found["frozen_fingerprint"], algorithm.reference_model.fingerprint
        if not math.isclose(expected, frozen, abs_tol=1e-6):
            raise ValueError(
                f"The frozen weights are others than those that {checkpoint} was trained on: give "
                f"the config of that run, whose paths must hold the same weights."
            )
    weights = trained_weights(checkpoint)
    check_fit(algorithm, shapes(weights))
    algorithm.load_state_dict(weights, strict=False)


def save_merged(network: Backbone, place: Path) -> list[Path]:
    """Writes a whole model for each adapter that trained; their folders.

    Args:
        network: Adapted.
        place: Folder of a single one; several get one each in it.
    """
    folders = []
    for adapter in network.trained_adapters:
        folder = place if len(network.trained_adapters) == 1 else place / adapter
        with quiet_transformers():
            merged(network, adapter).save_pretrained(folder)
        folders.append(folder)
    return folders

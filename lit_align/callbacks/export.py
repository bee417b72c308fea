"""The trained model as a folder that transformers loads without us."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.core.base import Algorithm
from lit_align.runs.atomic_io import atomic_folder
from lit_align.runs.export import export_folders, remove_stale_files, write_stop_ids
from lit_align.runs.model_card import write_card


class Export(Callback):
    """Writes `hf/` into the run folder when training ends: weights, tokenizer, stop ids, a card.

    Several trained roles get a folder each, `hf/<role>`.
    """

    def on_train_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Saves every trained role, whole again if it was sharded."""
        folder, main = Path(trainer.default_root_dir) / "hf", trainer.is_global_zero
        for network, target in export_folders(algorithm.roles, folder).items():
            tokenizer = write_stop_ids(network, trainer.datamodule)
            if not main:
                network.save(target, is_main_process=False)
                continue
            with atomic_folder(target) as part:
                network.save(part)
                tokenizer.save_pretrained(part)
                write_card(part, Path(trainer.default_root_dir), network)
                remove_stale_files(target, network)
        trainer.strategy.barrier("export")

"""Export of the trained networks as folders that transformers and peft load."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.core.base import Algorithm
from lit_align.runs.atomic_io import atomic_folder
from lit_align.runs.export import export_folders, remove_stale_files, write_stop_ids
from lit_align.runs.model_card import write_card


class Export(Callback):
    """Write weights, tokenizer, stop ids and a model card to `hf/` when training ends.

    Several trained roles get one folder each, `hf/<role>`.
    """

    def on_train_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save every trained network, unsharded. Every rank must call it."""
        folder, main = Path(trainer.default_root_dir) / "hf", trainer.is_global_zero
        for network, target in export_folders(algorithm.roles, folder).items():
            tokenizer = write_stop_ids(network, trainer.datamodule)
            if not main:  # takes part in gathering the shards
                network.save(target, is_main_process=False)
                continue
            with atomic_folder(target) as part:
                network.save(part)
                tokenizer.save_pretrained(part)
                write_card(part, Path(trainer.default_root_dir), network)
                remove_stale_files(target, network)
        trainer.strategy.barrier("export")

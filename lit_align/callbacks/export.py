"""The trained model as a folder that transformers loads without us."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.base import Algorithm
from lit_align.models.backbone import Backbone


class Export(Callback):
    """Writes `hf/` into the run folder when training ends: weights, tokenizer, stop ids.

    Several trained roles get a folder each, `hf/<role>`.
    """

    def on_train_end(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Saves every trained role, whole again if it was sharded."""
        folder = Path(trainer.default_root_dir) / "hf"
        for role, network in algorithm.roles.items():
            place = folder if len(algorithm.roles) == 1 else folder / role
            self.name_ends(trainer, network)
            if trainer.is_global_zero:
                clear(place, network)
            network.save(place, main=trainer.is_global_zero)
            if trainer.is_global_zero:
                trainer.datamodule.tokenizer.save_pretrained(place)
        trainer.strategy.barrier("export")

    def name_ends(self, trainer: Trainer, network: Backbone) -> None:
        """Writes into the model's own configuration where its answers end."""
        data, model = trainer.datamodule, network.network
        model.config.pad_token_id = data.tokenizer.pad_token_id
        if model.can_generate():
            stops = sorted({*network.stop_ids, *data.stop_ids})
            model.generation_config.eos_token_id = stops
            model.generation_config.pad_token_id = data.tokenizer.pad_token_id


def clear(place: Path, network: Backbone) -> None:
    """Removes what an earlier run left there and transformers would load along with the new.

    An adapter's folder names its base, unless it holds a whole model's configuration; a whole
    model's folder gets the adapter that lies beside it.

    Args:
        place: The folder to be written.
        network: What will be saved there.
    """
    if network.adapted is None:
        for file in place.glob("adapter_*"):
            file.unlink()
    elif Path(network.name).resolve() != place.resolve():
        (place / "config.json").unlink(missing_ok=True)

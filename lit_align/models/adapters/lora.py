"""Low-rank adapters, through peft."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


class LoRA:
    """Trains a low-rank update of the linear layers and leaves the base as it is.

    Dropout is always 0: sampling and scoring must see the same network.

    Args:
        rank: Columns of each low-rank factor.
        alpha: The update is scaled by alpha / rank.
        targets: Names of the layers that are adapted, or `all-linear` for all but the output head.
        train_fully: Names of layers that are trained whole and saved beside the adapter.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        targets: str | list[str] = "all-linear",
        train_fully: list[str] | None = None,
    ):
        self.rank, self.alpha = rank, alpha
        self.targets, self.train_fully = targets, train_fully

    def adapt(self, network: PreTrainedModel, task: str) -> PeftModel:
        """Puts the adapter into `network` itself and returns peft's view of it, which saves it.

        Args:
            network: The base; frozen from now on.
            task: peft's name of what the network does: CAUSAL_LM or SEQ_CLS.
        """
        return with_float_heads(get_peft_model(network, self.settings(task, self.train_fully)))

    def settings(
        self, task: str, train_fully: list[str] | None, exclude: list[str] | None = None
    ) -> LoraConfig:
        """What peft is told.

        Args:
            task: peft's name of what the network does.
            train_fully: Names of layers that are trained whole.
            exclude: Names of layers that get no adapter.
        """
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=self.targets,
            exclude_modules=exclude,
            modules_to_save=train_fully,
            task_type=task,
        )


def with_float_heads(adapted: PeftModel) -> PeftModel:
    """Layers that train whole in float32, as peft keeps adapters: bf16 loses small steps."""
    for name, weight in adapted.named_parameters():
        if ".modules_to_save." in name and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
    return adapted

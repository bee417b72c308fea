"""Low-rank adapters, through peft."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


class LoRA:
    """Trains a low-rank update of the linear layers and leaves the base as it is.

    Dropout is always 0: sampling and scoring must see the same network.

    Args:
        r: Columns of each low-rank factor.
        lora_alpha: The update is scaled by lora_alpha / r.
        target_modules: Names of adapted layers, or `all-linear` for all but the output head.
        modules_to_save: Names of layers that are trained whole and saved beside the adapter.
    """

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float = 32.0,
        target_modules: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
    ):
        self.r, self.lora_alpha = r, lora_alpha
        self.target_modules, self.modules_to_save = target_modules, modules_to_save

    def apply_to(self, network: PreTrainedModel, task_type: str) -> PeftModel:
        """Puts the adapter into `network` itself and returns peft's view of it, which saves it.

        Args:
            network: The base; frozen from now on.
            task_type: peft's name of what the network does: CAUSAL_LM or SEQ_CLS.
        """
        return upcast_modules_to_save(
            get_peft_model(network, self.peft_config(task_type, self.modules_to_save))
        )

    def peft_config(
        self,
        task_type: str,
        modules_to_save: list[str] | None,
        exclude_modules: list[str] | None = None,
    ) -> LoraConfig:
        """What peft is told.

        Args:
            task_type: peft's name of what the network does.
            modules_to_save: Names of layers that are trained whole.
            exclude_modules: Names of layers that get no adapter.
        """
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            target_modules=self.target_modules,
            exclude_modules=exclude_modules,
            modules_to_save=modules_to_save,
            task_type=task_type,
        )


def upcast_modules_to_save(adapted: PeftModel) -> PeftModel:
    """Layers that train whole in float32, as peft keeps adapters: bf16 loses small steps."""
    for name, weight in adapted.named_parameters():
        if ".modules_to_save." in name and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
    return adapted

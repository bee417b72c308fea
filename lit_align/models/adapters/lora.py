"""LoRA: low-rank adapters of peft on a frozen base (arXiv:2106.09685)."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


class LoRA:
    """Settings of a low-rank adapter: W = W0 + lora_alpha / r B A, with W0 frozen.

    Dropout is always 0, because sampling and scoring must compute the same network.

    Args:
        r: Columns of each low-rank factor.
        lora_alpha: Numerator of the update's scale, lora_alpha / r.
        target_modules: Names of adapted layers. `all-linear` is all but the output head.
        modules_to_save: Names of layers that train fully and are saved with the adapter. Default:
            none.

    Example:
        >>> LoRA(r=8).peft_config("CAUSAL_LM", modules_to_save=None).lora_dropout
        0.0
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
        """Add the adapter to a network in place, and return peft's wrapper of it.

        Args:
            network: Base, which is frozen.
            task_type: peft's name of the task: CAUSAL_LM or SEQ_CLS.
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
        """Return peft's configuration of the adapter.

        Args:
            task_type: peft's name of the task.
            modules_to_save: Names of layers that train fully.
            exclude_modules: Names of layers without an adapter. Default: none.
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
    """Cast `modules_to_save` to float32, because bf16 rounds away small updates.

    peft keeps the low-rank factors in float32 by itself (peft 0.21).

    Args:
        adapted: Network with adapters, changed in place.
    """
    for name, weight in adapted.named_parameters():
        if ".modules_to_save." in name and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
    return adapted

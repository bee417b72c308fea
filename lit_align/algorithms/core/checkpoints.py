"""What a checkpoint holds of an algorithm: its trained weights and its name."""

from typing import Any

from torch import nn

from lit_align.errors import UserError


def without_frozen(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without frozen weights, which are loaded from their path again.

    Args:
        module: The module of the state dict.
        state: Its state dict. Buffers stay.
    """
    weights = module.named_parameters(remove_duplicate=False)  # tied weights under each name
    frozen = {name for name, weight in weights if not weight.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def check_algorithm(checkpoint: dict[str, Any], name: str) -> None:
    """Refuse to resume the checkpoint of another algorithm than `name`."""
    if checkpoint["algorithm"] != name:
        raise UserError(
            f"The checkpoint is of a {checkpoint['algorithm']} run and cannot go on as {name}; "
            f"to start from its weights, give the path of its exported `hf` folder."
        )

"""Parts of a checkpoint that belong to an algorithm: its trained weights and its name."""

from typing import Any

from torch import nn

from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.errors import UserError
from lit_align.models.weights.state_dict_check import check_state_dict, weight_shapes
from lit_align.version import __version__


def drop_frozen_weights(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without frozen weights, which each run loads from their path.

    Args:
        module: The module of the state dict.
        state: The module's state dict. Buffers stay.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> linear.weight.requires_grad = False
        >>> [*drop_frozen_weights(linear, linear.state_dict())]
        ['bias']
    """
    weights = module.named_parameters(remove_duplicate=False)  # tied weights have several names
    frozen = {name for name, weight in weights if not weight.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def checkpoint_header(
    algorithm: nn.Module, iteration: int, reference: ReferenceModel | None
) -> dict[str, Any]:
    """Return what identifies a checkpoint: version, algorithm, iteration, frozen weights.

    Args:
        algorithm: The algorithm that is saved.
        iteration: Number of finished iterations, which seeds sampling and shuffling.
        reference: The algorithm's reference model, if it has one.
    """
    header: dict[str, Any] = {"iteration": iteration, "algorithm": type(algorithm).__name__}
    if reference is not None:  # identifies the frozen weights, which are not saved
        header["frozen_fingerprint"] = reference.fingerprint
    return {**header, "lit_align_version": __version__}


def check_checkpoint(
    checkpoint: dict[str, Any],
    algorithm: nn.Module,
    reference: ReferenceModel | None,
    is_training: bool,
) -> None:
    """Refuse a checkpoint of another algorithm, with other weights or with another reference.

    Args:
        checkpoint: The loaded checkpoint.
        algorithm: The algorithm that loads it.
        reference: The algorithm's reference model, if it has one.
        is_training: True for a resume. An evaluation needs only the weights.
    """
    name = type(algorithm).__name__
    if is_training and checkpoint["algorithm"] != name:
        raise UserError(
            f"The checkpoint was trained with {checkpoint['algorithm']} and cannot resume with "
            f"{name}. To start from its weights, use the path of its exported `hf` folder."
        )
    if checkpoint.get("state_dict"):  # `FSDP2` checks a sharded checkpoint itself
        check_state_dict(algorithm, weight_shapes(checkpoint["state_dict"]))
    if is_training and reference is not None:
        reference.check_fingerprint(checkpoint)

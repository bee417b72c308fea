"""Build networks and load their weights, from the hub, a folder or an adapter's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # transformers 5.23
from transformers.utils import logging as transformers_logging

from lit_align.errors import UserError
from lit_align.models.weights.sharded_loading import WeightFiles, build_on_meta

Configure = Callable[[PretrainedConfig], PretrainedConfig]


def load_network(
    auto_class: type[_BaseAutoModelClass],
    path: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
    defer_loading: bool = False,
) -> tuple[PreTrainedModel, list[str], WeightFiles | None]:
    """Load a network, or raise a `UserError` if that is not possible.

    Args:
        auto_class: transformers' class with the head.
        path: Hub id, folder of weights, or folder of an adapter, which is merged into its base.
        configure: Function that changes the configuration before the network is built.
        new_weights: Names of weights that the path may lack.
        options: Arguments of `from_pretrained`.
        defer_loading: Keep weights on the meta device until the network is sharded. The base of
            an adapter is always read at once.

    Returns:
        The network, the names of those `new_weights` that were initialized randomly, and the files
        that are still to be read, None if there are none.
    """
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"{path}: no such folder. Use a hub id or a folder of weights.")
    source = str(folder) if folder.is_dir() else path
    if (folder / "adapter_config.json").is_file():
        check_adapter_format(source)
        with convert_errors(f"{path} could not be loaded"):
            base = PeftConfig.from_pretrained(source).base_model_name_or_path
            # the base of a reward model's adapter may lack the head, which the adapter brings
            network, missing, _ = load_network(
                auto_class, base, configure, ("score.weight",), options
            )
            return *load_merged(network, missing, source, new_weights), None
    with convert_errors(f"{path} could not be loaded"), silence_transformers():
        loaded = load_pretrained(auto_class, source, configure, new_weights, options, defer_loading)
    check_missing_weights(path, loaded[1], new_weights)
    return loaded


def build_network(
    auto_class: type[_BaseAutoModelClass],
    name: str,
    config: Mapping[str, Any],
    configure: Configure,
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """Build a network with random weights, or raise a `UserError` if `config` is not possible.

    Args:
        auto_class: transformers' class with the head.
        name: Name of the network in an error message.
        config: Architecture: `model_type` and its fields.
        configure: Function that changes the configuration before the network is built.
        options: Arguments of `from_config`.
    """
    with convert_errors(f"{name} could not be built"):
        return auto_class.from_config(configure(AutoConfig.for_model(**config)), **options)


@contextmanager
def convert_errors(failure: str) -> Iterator[None]:
    """Raise errors of transformers about a configuration or weights as a `UserError`.

    The message is one line of at most 300 characters, as transformers may list all architectures.

    Args:
        failure: First words of the message.

    Example:
        >>> with convert_errors("x could not be loaded"):
        ...     raise OSError("no file named config.json")
        Traceback (most recent call last):
        lit_align.errors.UserError: x could not be loaded: no file named config.json
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(shorten(f"{failure}: {error}", 300, placeholder=" ...")) from error


def load_pretrained(
    auto_class: type[_BaseAutoModelClass],
    source: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
    defer_loading: bool,
) -> tuple[PreTrainedModel, list[str], WeightFiles | None]:
    """Load a folder or hub id that is not an adapter; arguments and result as in `load_network`."""
    hub_options = {key: options[key] for key in ("revision", "trust_remote_code")}
    settings = configure(AutoConfig.from_pretrained(source, **hub_options))
    if defer_loading:
        empty = build_on_meta(auto_class, source, settings, new_weights, options)
        if empty is not None:
            return empty
    # pickles can run code when they are read, so only safetensors are allowed
    network, report = auto_class.from_pretrained(
        source, config=settings, output_loading_info=True, use_safetensors=True, **options
    )
    return network, sorted(report["missing_keys"]), None


def load_merged(
    network: PreTrainedModel, missing: list[str], source: str, new_weights: tuple[str, ...]
) -> tuple[PreTrainedModel, list[str]]:
    """Merge a saved adapter into its base, and return the names of weights that both lack.

    Args:
        network: Base of the adapter.
        missing: Names of weights that the base lacks.
        source: Folder of the adapter.
        new_weights: Names of weights that may be missing.
    """
    settings = PeftConfig.from_pretrained(source)
    heads = [name for name, _ in network.named_children() if name == "score"]
    if heads and settings.task_type == "CAUSAL_LM":
        # the class that peft uses for this task requires a language head (peft 0.21)
        settings.task_type, settings.exclude_modules = None, heads
    adapted = PeftModel.from_pretrained(network, source, config=settings)
    saved = settings.modules_to_save or []
    missing = [name for name in missing if name.split(".")[0] not in saved]
    check_missing_weights(source, missing, new_weights)
    return adapted.merge_and_unload().requires_grad_(True), missing


def check_adapter_base(folder: str, name: str) -> None:
    """Raise a `UserError` if a folder has no adapter, or one that was trained on another base.

    Args:
        folder: Folder of the adapter.
        name: Path of the base to which it is added.
    """
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json. Use the folder of a saved adapter.")
    check_adapter_format(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path or "random weights"
    if base != name and Path(base).resolve() != Path(name).resolve():
        raise UserError(
            f"The adapter {folder} was trained on {base}, and the base here is {name}. "
            f"Use the same base, or the full model instead of the adapter."
        )


def check_adapter_format(folder: str) -> None:
    """Raise a `UserError` if an adapter's weights are not safetensors. Pickles are never read.

    Args:
        folder: Folder of the adapter.
    """
    if not (Path(folder).expanduser() / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder}: no adapter_model.safetensors. Convert an older .bin file with peft's "
            f"save_pretrained(folder, safe_serialization=True)."
        )


def check_adapter_task(folder: str, task_type: str) -> None:
    """Raise a `UserError` if a language model is to be loaded from a reward model's adapter.

    Args:
        folder: Folder of an adapter. Any other path is accepted.
        task_type: peft's name of the task of the network.
    """
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        return
    found = PeftConfig.from_pretrained(folder).task_type
    if (found, task_type) == ("SEQ_CLS", "CAUSAL_LM"):
        raise UserError(
            f"The adapter {folder} was trained with a score head ({found}), not as a language "
            f"model ({task_type}). Use an adapter of SFT, DPO or an online algorithm."
        )


def check_missing_weights(path: str, missing: list[str], new_weights: tuple[str, ...]) -> None:
    """Raise a `UserError` if a path lacks weights that cannot be initialized randomly.

    Args:
        path: Hub id or folder, for the message.
        missing: Names of weights that it lacks.
        new_weights: Names of weights that may be missing.
    """
    absent = [name for name in missing if name not in new_weights]
    if absent:
        algorithms = (
            "RewardModel or HydraSFT" if absent[0].startswith("score") else "SFT or HydraSFT"
        )
        raise UserError(
            f"{path} lacks {len(absent)} weights, the first is '{absent[0]}'. Use a path that has "
            f"them, such as the hf folder of a {algorithms} run."
        )


def without_dropout(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Set all dropout rates of a configuration to 0, and the values that a head needs.

    Args:
        config: Configuration, changed in place.
        overrides: Values by name.

    Example:
        >>> from transformers import GPT2Config
        >>> config = without_dropout(GPT2Config(attn_pdrop=0.25), {"num_labels": 1})
        >>> config.attn_pdrop, config.num_labels
        (0.0, 1)
    """
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, float):
            setattr(config, name, 0.0)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def resolve_dtype(name: str | None) -> torch.dtype:
    """Return the torch dtype that has this name.

    Args:
        name: Name such as bfloat16. None: the default dtype, which Lightning's precision sets.

    Example:
        >>> resolve_dtype("bfloat16"), resolve_dtype(None)
        (torch.bfloat16, torch.float32)
    """
    kind = getattr(torch, name, None) if name else torch.get_default_dtype()
    if not isinstance(kind, torch.dtype):
        raise UserError(f"Unknown dtype {name}. Use float32, bfloat16 or float16.")
    return kind


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and warnings while the context is open.

    Missing weights raise an error in `check_missing_weights`, so the warning is not needed.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()

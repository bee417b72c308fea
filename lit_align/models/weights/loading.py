"""Where a network's weights come from: the hub, a folder, an adapter's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
    """The network with all of its weights, or one sentence about what is missing.

    Returns:
        The network, those of `new_weights` that the path lacks: they are random; and the files
        that are still to be read, if there are any.

    Args:
        auto_class: transformers' class with the wanted head.
        path: Hub id, folder of weights, or folder of an adapter, which is merged into its base.
        configure: Changes the configuration before the network is built.
        new_weights: What the weights may lack.
        options: For `from_pretrained`.
        defer_loading: Leave the weights in their files, to be read when the network is sharded. The
            base of an adapter is always read at once.
    """
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a hub id or a folder of weights.")
    source = str(folder) if folder.is_dir() else path
    if (folder / "adapter_config.json").is_file():
        check_adapter_format(source)
        base = PeftConfig.from_pretrained(source).base_model_name_or_path
        network, missing, _ = load_network(auto_class, base, configure, ("score.weight",), options)
        return *load_merged(network, missing, source, new_weights), None
    try:
        with silence_transformers():
            loaded = load_pretrained(
                auto_class, source, configure, new_weights, options, defer_loading
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} could not be loaded: {reason}") from error
    check_missing_weights(path, loaded[1], new_weights)
    return loaded


def load_pretrained(
    auto_class: type[_BaseAutoModelClass],
    source: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
    defer_loading: bool,
) -> tuple[PreTrainedModel, list[str], WeightFiles | None]:
    """What transformers makes of a source, with or without its weights; see `load_network`."""
    hub_options = {key: options[key] for key in ("revision", "trust_remote_code")}
    settings = configure(AutoConfig.from_pretrained(source, **hub_options))
    if defer_loading:
        empty = build_on_meta(auto_class, source, settings, new_weights, options)
        if empty is not None:
            return empty
    network, report = auto_class.from_pretrained(
        source, config=settings, output_loading_info=True, use_safetensors=True, **options
    )  # files of pickles are never read
    return network, sorted(report["missing_keys"]), None


def load_merged(
    network: PreTrainedModel, missing: list[str], source: str, new_weights: tuple[str, ...]
) -> tuple[PreTrainedModel, list[str]]:
    """The base with a saved adapter in its weights, and what neither of the two has.

    Args:
        network: The base.
        missing: Weights that the base lacks.
        source: The adapter's folder.
        new_weights: What may be lacking.
    """
    settings = PeftConfig.from_pretrained(source)
    heads = [name for name, _ in network.named_children() if name == "score"]
    if heads and settings.task_type == "CAUSAL_LM":  # its class in peft asks for a language head
        settings.task_type, settings.exclude_modules = None, heads
    adapted = PeftModel.from_pretrained(network, source, config=settings)
    saved = settings.modules_to_save or []
    missing = [name for name in missing if name.split(".")[0] not in saved]
    check_missing_weights(source, missing, new_weights)
    return adapted.merge_and_unload().requires_grad_(True), missing


def check_adapter_base(folder: str, name: str) -> None:
    """Refuses an adapter that is none, or of another base.

    Args:
        folder: Of the adapter.
        name: Path of the base that is to wear it.
    """
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json, so no adapter is saved there.")
    check_adapter_format(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path or "random weights"
    if base != name and Path(base).resolve() != Path(name).resolve():
        raise UserError(
            f"The adapter {folder} was trained on {base}, and the base here is {name}: its "
            f"log-ratios would mean nothing. Take the same base, or give the whole model."
        )


def check_adapter_format(folder: str) -> None:
    """Refuses an adapter whose weights are no safetensors: files of pickles are never read.

    Args:
        folder: Of the adapter.
    """
    if not (Path(folder).expanduser() / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder}: no adapter_model.safetensors; peft writes one from an older .bin by "
            f"save_pretrained(folder, safe_serialization=True)."
        )


def check_adapter_task(folder: str, task_type: str) -> None:
    """Refuses an adapter that was trained to score where one is asked to speak.

    Args:
        folder: Of the adapter, or of anything else.
        task_type: peft's name of what is asked for.
    """
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        return
    found = PeftConfig.from_pretrained(folder).task_type
    if (found, task_type) == ("SEQ_CLS", "CAUSAL_LM"):
        raise UserError(
            f"The adapter {folder} was trained as a score head's ({found}) and not as a language "
            f"model's ({task_type}): give one that SFT, DPO or an online algorithm has written."
        )


def check_missing_weights(path: str, missing: list[str], new_weights: tuple[str, ...]) -> None:
    """Refuses a path that lacks more than it may."""
    absent = [name for name in missing if name not in new_weights]
    if absent:
        wanted = "RewardModel or HydraSFT" if absent[0].startswith("score") else "SFT or HydraSFT"
        raise UserError(
            f"{path} lacks {len(absent)} weights, the first is '{absent[0]}': give a path that has "
            f"them, such as the hf folder of a {wanted} run."
        )


def without_dropout(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Set all dropout rates of a configuration to 0, and the values that a head needs.

    Args:
        config: Configuration, changed in source.
        overrides: Values by name.
    """
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, float):
            setattr(config, name, 0.0)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def resolve_dtype(name: str | None) -> torch.dtype:
    """torch's data type of that name; without one the default, which the trainer sets."""
    kind = getattr(torch, name, None) if name else torch.get_default_dtype()
    if not isinstance(kind, torch.dtype):
        raise UserError(f"dtype {name} is none of torch's; take float32, bfloat16 or float16.")
    return kind


@contextmanager
def silence_transformers() -> Iterator[None]:
    """No bars and tables while loading and saving; missing weights are an error of ours."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()

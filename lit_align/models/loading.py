"""Where a network's weights come from: the hub, a folder, an adapter's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging as transformers_logging

Configure = Callable[[PretrainedConfig], PretrainedConfig]


def load_network(
    auto: type[_BaseAutoModelClass],
    path: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
) -> PreTrainedModel:
    """The network with all of its weights, or one sentence about what is missing.

    Args:
        auto: transformers' class with the wanted head.
        path: Hub id, folder of weights, or folder of an adapter, which is merged into its base.
        configure: Changes the configuration before the network is built.
        new_weights: What the weights may lack.
        options: For `from_pretrained`.
    """
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a hub id or a folder of weights.")
    place = str(folder) if folder.is_dir() else path
    if (folder / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(place).base_model_name_or_path
        network = load_network(auto, base, configure, ("score.weight",), options)
        merged = PeftModel.from_pretrained(network, place).merge_and_unload()
        return merged.requires_grad_(True)
    known = {key: options[key] for key in ("revision", "trust_remote_code")}
    try:
        settings = configure(AutoConfig.from_pretrained(place, **known))
        with quiet_transformers():
            network, report = auto.from_pretrained(
                place, config=settings, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} could not be loaded: {reason}") from error
    missing = sorted(set(report["missing_keys"]) - set(new_weights))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, the first is '{missing[0]}'.")
    return network


def data_type(name: str | None) -> torch.dtype:
    """torch's data type of that name; without one the default, which the trainer sets."""
    kind = getattr(torch, name, None) if name else torch.get_default_dtype()
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype {name} is none of torch's; take float32, bfloat16 or float16.")
    return kind


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and tables while loading and saving; missing weights are an error of ours."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()

"""Architectures without weights: a built-in shape, a config.json or a folder with one."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lit_align.errors import UserError
from lit_align.models.weights.loading import Configure

BUILTIN_PREFIX = "shape:"


def builtin_architectures() -> dict[str, dict[str, Any]]:
    """Return the published architectures by name.

    Each has `parameters` (their number), `hub` (ids on the Hugging Face hub) and `config`.

    Example:
        >>> builtin_architectures()["llama-2-7b"]["parameters"]
        6738415616
    """
    text = files("lit_align.plan").joinpath("architectures.json").read_text()
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def architecture_config(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return the configuration of an architecture. Nothing is downloaded.

    Args:
        path: `shape:` and a name, a JSON file, a folder with config.json, or a hub id. The hub id
            must be that of a built-in shape or of a model in the local cache.
        revision: Revision on the hub. None means the default branch.
        trust_remote_code: Run code that comes with a configuration.

    Example:
        >>> architecture_config("shape:llama-2-7b").num_hidden_layers
        32
    """
    if path.startswith(BUILTIN_PREFIX):
        return builtin_config(path.removeprefix(BUILTIN_PREFIX))
    place = Path(path).expanduser()
    if place.is_file():
        return config_from_json(place)
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(f"{path} has no config.json. Use a folder with one, or shape:NAME.")
    if place.is_dir():
        return config_from_json(place / "config.json")
    # Before the local cache, in which a gated model may be missing.
    known = {name: shape for name, shape in builtin_architectures().items() if path in shape["hub"]}
    if known:
        return builtin_config(next(iter(known)))
    try:
        return AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not on this machine, and plan reads nothing from the network. Use "
            f"shape:NAME (such as shape:llama-3-8b) or the path of a config.json."
        ) from error


def builtin_config(name: str) -> PretrainedConfig:
    """Return the configuration of a built-in architecture.

    Args:
        name: Name without `shape:`.
    """
    known = builtin_architectures()
    if name not in known:
        matches = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean '{matches[0]}'?" if matches else f"Use one of {', '.join(known)}."
        raise UserError(f"{BUILTIN_PREFIX}{name}: there is no such shape. {hint}")
    return AutoConfig.for_model(**known[name]["config"])


def config_from_json(file: Path) -> PretrainedConfig:
    """Return the configuration in a config.json.

    Args:
        file: Path of the file.
    """
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}). Use the config.json of a model.") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise UserError(f"{file} has no model_type. Use the config.json of a model.")
    try:
        return AutoConfig.for_model(**settings)
    except ValueError as error:
        # An unknown model_type: transformers explains it, over several lines.
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def build_without_weights(
    auto: type[_BaseAutoModelClass],
    path: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
    defer_loading: bool = False,
) -> tuple[PreTrainedModel, list[str], None]:
    """Replace `load_network`: build a network from its configuration, without reading weights.

    Args:
        auto: Auto class of transformers with the wanted head.
        path: Path as in `architecture_config`.
        configure: Function that changes the configuration before the network is built.
        new_weights: Not used, because no weight is missing.
        options: Arguments of `from_config`, and `revision`.
        defer_loading: Not used, because no weight is read.

    Returns:
        Network, an empty list of missing weights, and no weight files.
    """
    options = dict(options)
    settings = configure(
        architecture_config(path, options.pop("revision"), options["trust_remote_code"])
    )
    # Random initialization would cost one operator per weight, on tensors without values.
    with no_init_weights():
        return auto.from_config(settings, **options), [], None

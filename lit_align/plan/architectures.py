"""Architectures without weights: built-in ones, a config.json, a folder that has one."""

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
    """Published architectures by name: `parameters`, ids on the `hub`, and `config`."""
    text = files("lit_align.plan").joinpath("architectures.json").read_text()
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def architecture_config(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The architecture that a path means, without the network.

    Args:
        path: `shape:` and a name, a JSON file, a folder with config.json, or a hub id of a built-in
            shape or of what has been downloaded before.
        revision: On the hub.
        trust_remote_code: Whether code may be run that comes with a config.
    """
    if path.startswith(BUILTIN_PREFIX):
        return builtin_config(path.removeprefix(BUILTIN_PREFIX))
    place = Path(path).expanduser()
    if place.is_file():
        return config_from_json(place)
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(f"{path} has no config.json, so no architecture is known: name one.")
    if place.is_dir():
        return config_from_json(place / "config.json")
    known = {name: shape for name, shape in builtin_architectures().items() if path in shape["hub"]}
    if known:
        return builtin_config(next(iter(known)))
    try:
        return AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not on this machine, and plan reads nothing from the network: give "
            f"shape:NAME (such as shape:llama-3-8b) or the path of a config.json."
        ) from error


def builtin_config(name: str) -> PretrainedConfig:
    """A shape by its name."""
    known = builtin_architectures()
    if name not in known:
        matches = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{matches[0]}'?" if matches else f"there are {', '.join(known)}."
        raise UserError(f"{BUILTIN_PREFIX}{name}: there is no such shape; {hint}")
    return AutoConfig.for_model(**known[name]["config"])


def config_from_json(file: Path) -> PretrainedConfig:
    """A config.json."""
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise UserError(f"{file} has no model_type: give the config.json of a model.")
    try:
        return AutoConfig.for_model(**settings)
    except ValueError as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def build_without_weights(
    auto: type[_BaseAutoModelClass],
    path: str,
    configure: Configure,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
    defer_loading: bool = False,
) -> tuple[PreTrainedModel, list[str], None]:
    """`load_network` of weights that have no values, and that nothing lacks.

    Args:
        auto: transformers' class with the wanted head.
        path: As `architecture_config` takes it.
        configure: Changes the configuration before the network is built.
        new_weights: Not asked for.
        options: For `from_config`, and the revision.
        defer_loading: Not used, because no weight is read.
    """
    options = dict(options)
    settings = configure(
        architecture_config(path, options.pop("revision"), options["trust_remote_code"])
    )
    with no_init_weights():
        return auto.from_config(settings, **options), [], None

"""Read configs by name, and cut overlays to the chosen classes."""

import math
from pathlib import Path
from typing import Any

import yaml

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.cli.configs import missing_config, packaged_configs
from lit_align.cli.discovery import concrete_subclasses, init_arguments, module_of
from lit_align.cli.mistakes import unknown_class
from lit_align.data.base import TextDataModule
from lit_align.errors import UserError

Settings = dict[str, Any]
SECTIONS: dict[str, type] = {"model": Algorithm, "data": TextDataModule}


def read_config(name: str) -> Settings:
    """Return the settings of a file, or of a packaged config.

    Args:
        name: Path, or name of a packaged config.
    """
    path, known = Path(name), packaged_configs()
    if not path.is_file() and name not in known:
        raise UserError(missing_config(name, list(known)))
    try:
        settings = yaml.safe_load(path.read_text() if path.is_file() else known[name])
    except yaml.YAMLError as error:
        raise UserError(f"--config {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {name} must hold sections such as model and data.")
    for section in SECTIONS:  # `model: ReMax` is short for a class without arguments
        if isinstance(settings.get(section), str):
            settings[section] = {"class_path": settings[section]}
        check_section(name, section, settings.get(section))
    return settings


def check_section(config: str, section: str, value: Any) -> None:
    """Refuse a section that is neither a class's name nor a class with arguments.

    Args:
        config: Name of the config.
        section: model or data.
        value: What the config has there.
    """
    if value is not None and not isinstance(value, dict):
        raise UserError(f"--config {config}: {section} must be a class_path with init_args, "
                         f"found a {type(value).__name__}.")  # fmt: skip
    for key, expected in (("class_path", str), ("init_args", dict)):
        entry = (value or {}).get(key)
        if entry is not None and not isinstance(entry, expected):
            raise UserError(f"--config {config}: {section}.{key} must be a {expected.__name__}, "
                             f"found a {type(entry).__name__}.")  # fmt: skip


def to_inline_yaml(settings: Settings) -> str:
    """Return settings as one line of YAML, which the parser reads like a file.

    JSON cannot write infinity in a form that YAML reads.
    """
    line: str = yaml.safe_dump(settings, default_flow_style=True, width=math.inf, sort_keys=False)
    return line.strip()


def resolve_configs(argv: list[str]) -> list[str]:
    """Replace each `--config` of a command line by its text, without unused settings of overlays.

    An overlay is a config without `model.class_path`. It may have settings of several algorithms
    and data modules. Settings of classes that were not chosen are removed. Unknown settings
    stay, so that the parser refuses them.

    Args:
        argv: The words after `lit-align`.
    """
    argv = [part for arg in argv for part in split_option(arg)]
    positions = [i + 1 for i, arg in enumerate(argv[:-1]) if arg in ("--config", "-c")]
    configs = {position: read_config(argv[position]) for position in positions}
    chosen = {
        section: chosen_class(section, base, list(configs.values()), argv)
        for section, base in SECTIONS.items()
    }
    for position, settings in configs.items():
        if "class_path" not in (settings.get("model") or {}):
            settings = drop_unsupported(settings, chosen)
        argv[position] = to_inline_yaml(settings)
    return argv


def split_option(arg: str) -> list[str]:
    """Return `--config=x`, `--model=x` or `--data=x` as two words, and any other word alone."""
    prefixes = ("--config=", "-c=", "--model=", "--data=")
    return arg.split("=", 1) if arg.startswith(prefixes) else [arg]


def chosen_class(section: str, base: type, configs: list[Settings], argv: list[str]) -> type | None:
    """Return the class that the command line, or else the last config, names for `section`.

    Args:
        section: model or data.
        base: Parent of the section's classes.
        configs: Settings of all configs, in order.
        argv: The command line.
    """
    names = [(settings.get(section) or {}).get("class_path") for settings in configs]
    names += [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == f"--{section}"]
    name = next((name for name in reversed(names) if name), None)
    if name is None:
        return None
    if "." in name:
        module_of(name)  # defines the user's class, so that it is among the subclasses
    known = {kind.__name__: kind for kind in concrete_subclasses(base)}
    if name.rpartition(".")[2] not in known:
        raise UserError(unknown_class(f"--{section}", base, name))
    return known[name.rpartition(".")[2]]


def drop_unsupported(overlay: Settings, chosen: dict[str, type | None]) -> Settings:
    """Return an overlay without the settings that only classes other than the chosen ones have.

    Args:
        overlay: Settings of a config.
        chosen: The chosen class of each section.
    """
    algorithm = chosen["model"]
    offline = algorithm is not None and not issubclass(algorithm, OnlineAlgorithm)
    remaining = {k: v for k, v in overlay.items() if not (offline and k in ("rollout", "reward"))}
    for section, base in SECTIONS.items():
        kind, settings = chosen[section], (overlay.get(section) or {}).get("init_args")
        if kind is not None and settings:
            anywhere = set().union(*map(init_arguments, concrete_subclasses(base)))
            unsupported = anywhere - init_arguments(kind)
            supported = {k: v for k, v in settings.items() if k not in unsupported}
            remaining[section] = {**overlay[section], "init_args": supported}
    return remaining

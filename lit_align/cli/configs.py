"""The configs that ship with lit_align: recipes, and overlays that change a recipe."""

import difflib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from lit_align.errors import UserError
from lit_align.renamed import CONFIGS

HELP = """usage: lit-align configs list | copy NAME [FILE]

list          print the recipes and the overlays that ship with lit_align
copy NAME     write one into FILE (default NAME.yaml) to be edited
"""
GROUPS = {  # title by folder
    "": "Recipes (--config NAME):",
    "overlays": "Overlays, which change a recipe (--config RECIPE --config NAME):",
}


def packaged_configs() -> dict[str, str]:
    """Return the text of each config that ships with lit_align, by name."""
    texts = {file.name: file.read_text() for group in GROUPS for file in yaml_files(group)}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


def yaml_files(group: str) -> Iterator[Traversable]:
    """Yield the YAML files of one group.

    Args:
        group: Folder below `configs/`; empty for the recipes.
    """
    folder = files("lit_align.configs").joinpath(group)
    yield from (file for file in folder.iterdir() if file.name.endswith(".yaml"))


def run_configs(args: list[str]) -> int:
    """Run `lit-align configs` and return its exit status.

    Args:
        args: The words after `configs`.
    """
    texts = packaged_configs()
    if args == ["list"]:
        print_groups(texts)
        return 0
    if args[:1] != ["copy"] or not 2 <= len(args) <= 3:
        print(HELP, end="")
        return 0 if args in ([], ["--help"], ["-h"]) else 2
    if args[1] not in texts:
        raise UserError(missing_config(args[1], list(texts)))
    target = Path(args[2] if len(args) == 3 else f"{args[1]}.yaml")
    if target.exists():
        raise UserError(f"{target} exists already. Name another file.")
    target.write_text(texts[args[1]])
    print(f"wrote {target}")
    return 0


def missing_config(name: str, known: list[str]) -> str:
    """Return a sentence about a config that is not there, with the name that may be meant.

    Args:
        name: As given.
        known: Names of the configs that ship with lit_align.
    """
    if name in CONFIGS:
        return f"config {name} was renamed to {CONFIGS[name]}. Use --config {CONFIGS[name]}."
    if Path(name).stem in known:
        return f"{name}: no such file. Use --config {Path(name).stem}."
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"The configs are {', '.join(known)}."
    return f"config {name}: no such file and no packaged config. {hint}"


def print_groups(texts: dict[str, str]) -> None:
    """Print each group's title, and a line per config with its name and purpose.

    Args:
        texts: Text of each config by name; its first line is a comment with the purpose.
    """
    for group, title in GROUPS.items():
        print(title)
        for name in sorted(file.name.removesuffix(".yaml") for file in yaml_files(group)):
            print(f"  {name:17} {texts[name].splitlines()[0].lstrip('# ')}")

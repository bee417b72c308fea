"""The configs that ship with lit_align."""

from importlib.resources import files
from pathlib import Path

HELP = """usage: lit-align configs list | copy NAME [FILE]

list          names the configs that ship with lit_align
copy NAME     writes one into FILE (NAME.yaml) to be edited
"""


def packaged() -> dict[str, str]:
    """The text of each config that ships with lit_align, by name."""
    folder = files("lit_align.configs").iterdir()
    texts = {file.name: file.read_text() for file in folder if file.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


def configs(args: list[str]) -> int:
    """Lists the packaged configs, or copies one."""
    texts = packaged()
    if args == ["list"]:
        for name, text in texts.items():
            print(f"{name:16} {text.splitlines()[0].lstrip('# ')}")
        return 0
    if args[:1] != ["copy"] or not 2 <= len(args) <= 3:
        print(HELP, end="")
        return 0 if args in ([], ["--help"], ["-h"]) else 2
    if args[1] not in texts:
        raise ValueError(f"There is no config '{args[1]}'; there are {', '.join(texts)}.")
    target = Path(args[2] if len(args) == 3 else f"{args[1]}.yaml")
    if target.exists():
        raise ValueError(f"{target} is there already; name another file.")
    target.write_text(texts[args[1]])
    print(f"wrote {target}")
    return 0

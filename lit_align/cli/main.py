"""The command `lit-align`."""

import sys
from pathlib import Path

from lit_align.version import __version__

CONFIGS_HELP = """usage: lit-align configs list | copy NAME [FILE]

list          names the configs that ship with lit_align
copy NAME     writes one into FILE (NAME.yaml) to be edited
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; what is wrong with it is said in a sentence, with status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        print(f"lit-align {__version__}")
        return 0
    # What follows imports torch; the version does not need it.
    from lit_align.cli.messages import explained

    try:
        return configs(args[1:]) if args[:1] == ["configs"] else run(args)
    except Exception as error:
        text = explained(error)
        if text is None:
            raise
        print(f"lit-align: {text}", file=sys.stderr)
        return 2


def run(args: list[str]) -> int:
    """Everything that Lightning's Trainer does: fit, validate, test, predict."""
    from lit_align.cli.align import AlignCLI
    from lit_align.cli.messages import quieten
    from lit_align.cli.overlays import fit_overlays
    from lit_align.cli.rooms import open_rooms

    quieten()
    open_rooms()
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as python itself would find them
    AlignCLI(fit_overlays(args))
    return 0


def configs(args: list[str]) -> int:
    """Lists the packaged configs, or copies one."""
    from lit_align.cli.overlays import packaged

    texts = packaged()
    if args == ["list"]:
        for name, text in texts.items():
            print(f"{name:16} {text.splitlines()[0].lstrip('# ')}")
        return 0
    if args[:1] != ["copy"] or not 2 <= len(args) <= 3:
        print(CONFIGS_HELP, end="")
        return 0 if args in ([], ["--help"], ["-h"]) else 2
    if args[1] not in texts:
        raise ValueError(f"There is no config '{args[1]}'; there are {', '.join(texts)}.")
    target = Path(args[2] if len(args) == 3 else f"{args[1]}.yaml")
    if target.exists():
        raise ValueError(f"{target} is there already; name another file.")
    target.write_text(texts[args[1]])
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

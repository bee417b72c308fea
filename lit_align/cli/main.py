"""The command `lit-align`."""

import importlib
import sys
from pathlib import Path

from lit_align.cli.configs import run_configs
from lit_align.version import __version__

TOOLS = ("chat", "evaluate", "export", "plan", "report")  # modules of this room, each with a `main`


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; what is wrong with it is said in a sentence, with status 2."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if args in (["--version"], ["-V"]):
        print(f"lit-align {__version__}")
        return 0
    hint(args)
    try:
        if args[:1] == ["configs"]:
            return run_configs(args[1:])
        return tool(args) if args and args[0] in TOOLS else run(args)
    except Exception as error:
        from lit_align.cli.errors import explained  # imports torch: not for a version or a list
        from lit_align.terminal import harmless

        text = explained(error)
        if text is None:
            raise
        print(f"lit-align: {harmless(text)}", file=sys.stderr)
        return 2


def hint(args: list[str]) -> None:
    """Prints above a help what Lightning does not know of.

    Args:
        args: The words that were given.
    """
    named = [word for word in args if word not in ("--help", "-h")]
    if named == args:
        return
    if not named:
        tools = " | ".join(["configs", *TOOLS])
        print(f"beside the Trainer's: lit-align {tools}, each with --help")
    if named[:1] in ([], ["fit"]):
        print("`fit --plan` says first what a fit will take, and afterwards how far that was off\n")


def tool(args: list[str]) -> int:
    """What stands beside the Trainer; loaded when it is asked for."""
    status: int = importlib.import_module(f"lit_align.cli.{args[0]}").main(args[1:])
    return status


def run(args: list[str]) -> int:
    """Everything that Lightning's Trainer does: fit, validate, test, predict."""
    from lit_align.cli.align import AlignCLI
    from lit_align.cli.discovery import open_rooms
    from lit_align.cli.errors import quieten
    from lit_align.cli.overlays import fit_overlays

    quieten()
    open_rooms()
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as python itself would find them
    plans = args[0] == "fit" and "--plan" in args
    read = fit_overlays([word for word in args if not (plans and word == "--plan")])
    planned = None
    if plans:
        from lit_align.cli.foretelling import foretold

        planned = foretold(read[1:])
    AlignCLI(read, args, planned)
    return 0


if __name__ == "__main__":
    sys.exit(main())

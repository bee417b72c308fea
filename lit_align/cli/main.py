"""The command `lit-align`: find the command, run it, and print a user's mistake as a sentence.

The modules that this file imports must not import torch: `lit-align --help` must print at once.
"""

import difflib
import importlib
import sys
from pathlib import Path

from lit_align.cli.configs import run_configs
from lit_align.errors import UserError
from lit_align.renamed import renamed_flag
from lit_align.terminal import strip_control_characters
from lit_align.version import __version__

TRAINER_COMMANDS = {
    "fit": "train a model: lit-align fit --config remax --config toy",
    "validate": "run the validation of a config",
    "test": "run the test rows of a config",
    "predict": "write a completion for each prompt",
}
TOOLS = {  # modules of this folder, each with a `main`
    "plan": "estimate the peak memory of a fit, without a GPU and without weights",
    "export": "turn a checkpoint into a folder that transformers loads",
    "evaluate": "compare models on the same prompts",
    "report": "write one HTML page about runs",
    "chat": "talk to a model, or to two side by side",
    "configs": "list or copy the configs that ship with lit_align",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    A user's mistake is printed as a sentence and has status 2. Other errors keep their traceback.

    Args:
        argv: The words after `lit-align`. Default: those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in ([], ["--help"], ["-h"], ["help"]):
        print(help_text())
        return 0
    if args[0] in ("--version", "-V"):
        print(f"lit-align {__version__}")
        return 0
    try:
        return run_command(args[0], args[1:])
    except Exception as error:
        text = user_message(error)
        if text is None:
            raise
        print(f"lit-align: {strip_control_characters(text)}", file=sys.stderr)
        return 2


def help_text() -> str:
    """Return what `lit-align --help` prints."""
    lines = ["usage: lit-align COMMAND [options]", "", "Align language models on Lightning.", ""]
    for title, commands in (("Training", TRAINER_COMMANDS), ("Tools", TOOLS)):
        lines += [f"{title}:", *(f"  {name:9} {text}" for name, text in commands.items()), ""]
    return "\n".join(
        [
            *lines,
            "lit-align COMMAND --help shows the options of a command.",
            "lit-align fit --model.help ReMax shows the options of an algorithm.",
        ]
    )


def run_command(name: str, args: list[str]) -> int:
    """Import and run one command; return its exit status.

    Args:
        name: The command.
        args: The words after it.
    """
    if name == "configs":
        return run_configs(args)
    if name not in {**TRAINER_COMMANDS, **TOOLS}:
        near = difflib.get_close_matches(name, [*TRAINER_COMMANDS, *TOOLS], n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "See lit-align --help."
        raise UserError(f"'{name}' is not a command. {hint}")
    for word in args:
        if (sentence := renamed_flag(name, word.partition("=")[0])) is not None:
            raise UserError(sentence)
    if name in TOOLS:
        status: int = importlib.import_module(f"lit_align.cli.{name}").main(args)
        return status
    return run_trainer([name, *args])


def run_trainer(args: list[str]) -> int:
    """Run fit, validate, test or predict by Lightning's Trainer.

    Args:
        args: The words after `lit-align`.
    """
    from lit_align.cli.align import AlignCLI
    from lit_align.cli.discovery import import_all
    from lit_align.cli.errors import silence_known_warnings
    from lit_align.cli.overlays import resolve_configs

    silence_known_warnings()
    import_all()
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as python itself would find them
    AlignCLI(resolve_configs(args), args)
    return 0


def user_message(error: Exception) -> str | None:
    """Return the sentence for an error that a user can correct; None for any other error.

    Args:
        error: What a command raised.
    """
    if isinstance(error, UserError):
        return str(error)
    if "lit_align.cli.errors" not in sys.modules:  # no library that explains itself was imported
        return None
    from lit_align.cli.errors import library_message

    return library_message(error)


if __name__ == "__main__":
    sys.exit(main())

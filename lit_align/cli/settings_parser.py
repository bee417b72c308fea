"""The parser of configs and settings: jsonargparse, with errors of one sentence."""

import argparse
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.errors import one_line, wrapped_user_error
from lit_align.cli.mistakes import find_mistake
from lit_align.data.base import TextDataModule
from lit_align.errors import UserError


class SettingsParser(LightningArgumentParser):
    """Parse settings into classes; name the first wrong setting and the nearest valid name."""

    words: tuple[str, ...] = ()  # the command line that is being parsed

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add a class, without reading the file of a data section as a config."""
        if isinstance(theclass, type) and issubclass(theclass, TextDataModule):
            kwargs["sub_configs"] = False
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        return added

    def parse_args(self, args: Any = None, *others: Any, **settings: Any) -> Any:
        """Parse a command line, and keep it for the message of an error."""
        self.words = tuple(args or ())
        return super().parse_args(args, *others, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a sentence about the first wrong setting as a `UserError`.

        A nested parser leaves its error to the outer one.

        Args:
            message: jsonargparse's own report.
            ex: The exception behind it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if (wrapped := wrapped_user_error(ex)) is not None:
            raise UserError(str(wrapped)) from ex
        parser: Any = getattr(ex, "subcommand_parser", None) or self.command_parser()
        options = {action.dest for action in parser._actions}  # argparse has no public list (3.13)
        known = {option.partition(".")[0] for option in options if option != argparse.SUPPRESS}
        mistake = find_mistake(self.words, known)
        raise UserError(mistake or one_line(message)) from ex

    def command_parser(self) -> Any:
        """Return the parser of the command that is parsed, or this one without commands."""
        command = self.words[0] if self.words else ""
        for action in self._actions:  # argparse has no public list (3.13)
            if isinstance(action.choices, dict) and command in action.choices:
                return action.choices[command]
        return self

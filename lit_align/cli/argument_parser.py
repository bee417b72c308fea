"""argparse for the commands that do not run the Trainer, with errors of one sentence."""

import argparse
from typing import NoReturn

from lit_align.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence that names the help."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`."""
        raise UserError(f"{message}. See {self.prog} --help.")

"""A plain parser for the commands that are no Trainer's."""

import argparse
import sys
from typing import NoReturn


class Words(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the sentence and leaves with status 2."""
        sys.stderr.write(f"lit-align: {message} (see {self.prog} --help).\n")
        sys.exit(2)

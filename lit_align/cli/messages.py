"""What went wrong, in a sentence: the parser's reports without its inner life."""

import difflib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.rooms import arguments, kinds

NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$"
    r"|Expected a <class 'NoneType'>|Given value|Expected a path but |^$"
)
TRAINER_HINTS = {
    "gradient_clip_val": "set --model.max_grad_norm instead, which clips each role by itself.",
    "accumulate_grad_batches": "set --model.microbatch_tokens instead; it never changes results.",
}


class Parser(LightningArgumentParser):
    """Refuses unknown keys and wrong types in one or two lines, with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the sentence and leaves with status 2; parsers inside of parsers raise."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [action.dest for action in parser._actions]
        sys.stderr.write(f"lit-align: {sentence(message, options)}\n")
        sys.exit(2)


def sentence(message: str, options: Iterable[str]) -> str:
    """The parser's report as one or two lines.

    Args:
        message: What jsonargparse reports.
        options: Dotted keys that the parser knows.
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    kept = [line for line in lines if not NOISE.search(line)]
    text = " ".join(dict.fromkeys(kept))
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)':", r"\1:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r'Parser key "([\w.]+)":', r"--\1:", text)
    return text + nearest(message, text, options)


def nearest(message: str, text: str, options: Iterable[str]) -> str:
    """' Did you mean ...?', for a name that stands close to one that exists."""
    wrong = re.search(
        r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)"
        r"|[Kk]ey '([\w.]+)' is not expected|import path string: ([\w.]+)"
        r"|Group '\w+' does not accept nested key '([\w.]+)'|Unexpected class path '([\w.]+)'",
        message,
    )
    if wrong is None:
        return ""
    name = next(group for group in wrong.groups() if group)
    owners = re.findall(r"\b([A-Z]\w+):", text)
    known = set(options) | {kind.__name__ for kind in kinds(object) if ours(kind)}
    for kind in kinds(object):
        if kind.__name__ in owners and ours(kind):
            known = arguments(kind)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def ours(kind: type) -> bool:
    """Whether a class belongs to lit_align."""
    return kind.__module__.startswith("lit_align.")


def quieten() -> None:
    """Leaves out what others print at every start and no user can act on."""
    chatter = re.compile(r"💡|GPU available: False|TPU available|to estimate number of stepping")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not chatter.search(record.getMessage()))
    warnings.filterwarnings("ignore", r"'set_vital' is deprecated", UserWarning)
    for text in ("treespec", "Found .* module.*in eval mode", ".* does not have many workers"):
        warnings.filterwarnings("ignore", f".*{text}")


def explained(error: Exception) -> bool:
    """Whether an error was raised by our own files: then its text is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(__file__).parents[1] in Path(frames[-1].filename).parents

"""`lit-align plan`: estimate the peak memory of a run before it starts."""

import argparse
import re
import sys
from pathlib import Path

from lit_align.cli.argument_parser import ArgumentParser

ABOUT = (
    "Estimate the peak memory of a fit by phase, from the real code on tensors without values. "
    "Needs no GPU, no weights, no data and no network. Takes all options of `lit-align fit`. A "
    "model's path may be a config.json or a name such as shape:llama-3-8b. Exit status 0: fits, "
    "1: does not fit, 2: wrong input."
)
SIZE_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def main(argv: list[str]) -> int:
    """Parse the words after `plan`, simulate the fit and print its memory.

    Args:
        argv: The words after `plan`.
    """
    options, words = build_parser().parse_known_args(argv)
    from lit_align.cli.discovery import import_all
    from lit_align.cli.errors import silence_known_warnings
    from lit_align.cli.plan_run import disable_logging, run_plan
    from lit_align.models.weights.loading import silence_transformers

    silence_known_warnings()
    import_all()
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as for `fit`
    with disable_logging(), silence_transformers():
        return run_plan(words, options)


def build_parser() -> ArgumentParser:
    """Return the parser of the options that `plan` has in addition to those of `fit`."""
    parser = ArgumentParser(prog="lit-align plan", description=ABOUT, allow_abbrev=False)
    add = parser.add_argument
    add("--gpu_memory", type=parse_size, default="80GB", metavar="80GB",
        help="Memory of a GPU: a number and GB (10^9 bytes) or GiB (2^30 bytes).")  # fmt: skip
    add("--prompt_tokens", type=int, metavar="TOKENS",
        help="Length of each prompt or text. Default: the maximum that the data section allows.",
    )  # fmt: skip
    add("--json", action="store_true", help="Print all bytes as JSON.")
    return parser


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 80GB.

    Example:
        >>> parse_size("24GiB") == 24 * 2**30
        True
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(SIZE_UNITS)})?", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"invalid size {text}. Set for example 80GB")
    return int(float(found[1]) * SIZE_UNITS[found[2] or "GB"])

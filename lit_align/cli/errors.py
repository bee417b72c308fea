"""What went wrong, in a sentence: the parser's reports without its inner life."""

import difflib
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from lit_align.algorithms.core.base import Algorithm
from lit_align.cli.discovery import arguments, kinds
from lit_align.data.base import TextData
from lit_align.models.backbone import Backbone
from lit_align.rewards.base import RewardFunction

NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$"
    r"|Expected a <class '(NoneType|list)'>|Given value|Expected a path but "
    r"|^$"
)
ABOUT_SETTINGS = re.compile(  # where libraries refuse what a config says
    r"lightning/pytorch/trainer/(connectors|configuration_validator)"
    r"|lightning/(fabric|pytorch)/accelerators/"
    r"|transformers/models/auto/configuration_auto|huggingface_hub/dataclasses"
)
EVALUATING = re.compile(r"lightning/pytorch/loops/(evaluation|prediction)_loop")
EVALUATION_FULL = (  # the phases of an iteration say it themselves
    "Out of memory in phase evaluate: lower --data.eval_batch_size or --model.microbatch_tokens, "
    "or set --model.policy.dtype bfloat16."
)
ABOUT_DEVICES = " --trainer.accelerator auto and --trainer.devices auto take what this machine has."
WRITERS = re.compile(  # who writes into the run folder
    r"/fsspec/|/tensorboard/|lightning/(fabric|pytorch)/loggers/|lit_align/(callbacks|cli)/"
)
BASES = (Algorithm, Backbone, TextData, RewardFunction, Callback, Optimizer)


class Parser(LightningArgumentParser):
    """Refuses unknown keys and wrong types in one or two lines, with the nearest valid name."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """The file that data are read from is no config: its text would take its name's place."""
        if isinstance(theclass, type) and issubclass(theclass, TextData):
            kwargs["sub_configs"] = False
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the sentence and leaves with status 2; parsers inside of parsers raise."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [a.dest for a in parser._actions if not a.dest.endswith("help")]
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
    text = " ".join(dict.fromkeys(kept)).replace(" Expected a typing.Literal", " or one of ")
    text = re.sub(r"Type \S+Callable\[.*?\]+ expects a function or a callable class: ", "", text)
    text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class '\1'", text)
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)':", r"\1:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r'Parser key "([\w.]+)":', r"--\1:", text)
    given = re.findall(r"^\s*Given value: (\w{1,30})$", message, re.MULTILINE)
    text += f" Found: {given[0]}" if given and "Expected a" in text else ""
    return f"{text.rstrip('. ')}.{nearest(message, text, options)}"


def nearest(message: str, text: str, options: Iterable[str]) -> str:
    """' Did you mean ...?', for a name that stands close to one that exists."""
    classes = {kind.__name__: kind for base in BASES for kind in kinds(base)}
    owners = [classes[name] for name in re.findall(r"\b([A-Z]\w+):", text) if name in classes]
    anywhere = set().union(*map(arguments, classes.values()))
    places: dict[str, list[Iterable[str]]] = {
        r"import path string: ([\w.]+)": [classes],
        r"unrecognized arguments: --([\w.]+)|[Kk]ey '([\w.]+)' is not expected": [options],
        r"Option '([\w.]+)' is not accepted": [*map(arguments, owners[-1:]), anywhere],
    }
    for pattern, known in places.items():
        found = re.search(pattern, message)
        wrong = next(filter(None, found.groups())) if found else ""
        for names in known:
            near = difflib.get_close_matches(wrong, list(names), n=1)
            if near and near[0] == wrong:
                return f" '{wrong}' exists, but not for this argument."
            if near:
                return f" Did you mean '{near[0]}'?"
    return ""


def quieten() -> None:
    """Leaves out what others print at every start and no user can act on."""
    chatter = re.compile(r"💡|GPU available: False|TPU available|to estimate number of stepping")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not chatter.search(record.getMessage()))
    warnings.filterwarnings("ignore", r"'set_vital' is deprecated", UserWarning)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints that it starts
    ours = (
        r"It is recommended to use `self\.log\(.*sync_dist"  # such means are of all ranks already
    )
    for text in (
        ours,
        "treespec",
        "Found .* module.*in eval mode",
        ".* does not have many workers",
    ):
        warnings.filterwarnings("ignore", f".*{text}")


def explained(error: Exception) -> str | None:
    """The text of an error that our own code raises, for it is meant for the user; else None.

    What torch or Python raise while our code runs keeps its traceback.
    """
    if str(error).startswith("Does not validate against"):  # ours, seen through the parser
        return sentence(str(error), ())
    frames = traceback.extract_tb(error.__traceback__)
    evaluating = any(EVALUATING.search(frame.filename) for frame in frames)
    if isinstance(error, torch.OutOfMemoryError) and evaluating:
        return f"{EVALUATION_FULL} {error}"
    ours = bool(frames) and Path(__file__).parents[1] in Path(frames[-1].filename).parents
    said = ours and (frames[-1].line or "").startswith("raise ")
    if frames and ABOUT_SETTINGS.search(Path(frames[-1].filename).as_posix()):
        text = " ".join(str(error).split())
        text = text if len(text) < 300 else f"{text[:300]}..."
        device = re.search(
            "/accelerators/|accelerator_connector", Path(frames[-1].filename).as_posix()
        )
        return f"{text}{ABOUT_DEVICES}" if device else text
    if not said and is_full(error):
        named = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return (
            f"There is no room left on the disk{named}. Make some, or write elsewhere with "
            f"--trainer.default_root_dir; checkpoints that were saved before are whole, and "
            f"--ckpt_path last goes on."
        )
    if isinstance(error, OSError) and error.filename and written(frames):
        return (
            f"{error.filename}: {error.strerror}. The run folder, --trainer.default_root_dir, must "
            f"be one that can be written."
        )
    return str(error) if said else None


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or the largest size of a file is used up, whoever says so."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)  # of safetensors


def written(frames: Iterable[traceback.FrameSummary]) -> bool:
    """Whether what failed was a file of the run, and not one that a user's code opened."""
    library = str(Path(os.__file__).parent)
    own = [
        frame.filename
        for frame in frames
        if "site-packages" in frame.filename or not frame.filename.startswith(("<frozen", library))
    ]
    return bool(own) and WRITERS.search(Path(own[-1]).as_posix()) is not None

"""A user's Python function as a reward, with the signature of TRL."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError, RewardFunction, Scores


class FunctionReward(RewardFunction):
    """A function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    It is a `def` or an `async def` and returns one score per row, or None if it does not apply.
    It receives the keyword arguments that it names, or all with `**kwargs`. Prompts and
    completions are texts, or lists of messages if the data set has messages. `completion_ids` are
    token ids with the stop token. The other arguments are columns of the data set.

    Args:
        function: Location of the function: `module.name`, also of the current folder, or
            `file.py:name`.
    """

    def __init__(self, function: str):
        self.function = load_function(function)
        parameters = inspect.signature(self.function).parameters.values()
        self.accepts_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        named = [
            parameter
            for parameter in parameters
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        self.accepted_arguments = {parameter.name for parameter in named}
        self.required_arguments = {
            parameter.name for parameter in named if parameter.default is parameter.empty
        }

    @property
    def name(self) -> str:
        """Name of the Python function or of its class."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def is_async(self) -> bool:
        """True for an `async def`."""
        call = getattr(self.function, "__call__", None)  # noqa: B004
        return any(inspect.iscoroutinefunction(candidate) for candidate in (self.function, call))

    def __call__(self, batch: Experience) -> Scores | Awaitable[Scores]:
        """Return the N scores of the function, or an awaitable of them."""
        scores: Scores | Awaitable[Scores] = self.function(**self.call_arguments(batch))
        return scores

    def call_arguments(self, batch: Experience) -> dict[str, Any]:
        """Return the keyword arguments that the function accepts.

        Args:
            batch: N rows with responses.
        """
        ids = zip(batch.responses.tolist(), batch.response_lengths, strict=True)
        available = {
            **batch.columns,
            "prompts": batch.columns["prompt"],
            "completions": batch.columns["completion"],
            "completion_ids": [row[:length] for row, length in ids],
        }
        del available["prompt"], available["completion"]  # TRL passes the plural names only
        missing = sorted(self.required_arguments - set(available))
        if missing:
            known = ", ".join(available)
            raise RewardError(
                f"needs the argument '{missing[0]}', but there are only: {known}. Rename the "
                f"argument, or a column with --data.rename_columns."
            )
        if self.accepts_all:
            return available
        return {name: value for name, value in available.items() if name in self.accepted_arguments}


def load_function(path: str) -> Callable[..., Any]:
    """Return the function at an import path.

    Args:
        path: `module.name` or `file.py:name`.

    Example:
        >>> load_function("math.sqrt")(9)
        3.0
    """
    file, colon, name = path.rpartition(":")
    if not colon:
        file, _, name = path.rpartition(".")
    if not file or not name:
        raise UserError(
            f"reward function '{path}': there is no module in this path. Set "
            f"--reward.functions.function to `module.name` or `file.py:name`."
        )
    try:
        module = import_from_file(file) if file.endswith(".py") else import_by_name(file)
    except Exception as error:  # the user's module may raise anything at import
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"reward function '{path}': cannot import {file}: {reason}") from error
    function: Any = getattr(module, name, None)
    if function is None:
        raise UserError(f"reward function '{path}': {file} has no '{name}'")
    if not callable(function):
        kind = type(function).__name__
        raise UserError(f"reward function '{path}': '{name}' is a {kind}, not a function")
    loaded: Callable[..., Any] = function
    return loaded


def import_by_name(name: str) -> ModuleType:
    """Return a module by its dotted name, also of the current folder, as with `python -m`."""
    add_to_sys_path(Path.cwd())
    return importlib.import_module(name)


def import_from_file(file: str) -> ModuleType:
    """Return a module from a file, which may import other files of its folder."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError("no such file")
    add_to_sys_path(path.parent)
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def add_to_sys_path(folder: Path) -> None:
    """Let imports of this process find the modules of a folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

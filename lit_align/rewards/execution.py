"""Execution of reward functions: time limits, async calls and the row of a failure."""

from __future__ import annotations

import asyncio
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError, RewardFunction, last_turn


@dataclass(frozen=True)
class RowFailure:
    """A row without a score, and the reason.

    Args:
        message: The failure, as the rest of a sentence that starts with the function's name.
        cause: The exception, if there was one.
    """

    message: str
    cause: BaseException | None = None


Outcome = float | None | RowFailure


class RewardExecutor:
    """Calls reward functions and finds the row on which one fails or hangs.

    Async functions run while the others do.

    Args:
        timeout: Most seconds of a call. Default: no limit.
        skip_failed_prompts: Return a failed row as a `RowFailure`. False: it ends the run.
    """

    def __init__(self, timeout: float | None = None, skip_failed_prompts: bool = False):
        if timeout is not None and timeout <= 0:
            raise UserError(
                f"timeout must be above 0 seconds, found {timeout:g}. Set --reward.timeout."
            )
        self.timeout, self.skip_failed_prompts = timeout, skip_failed_prompts

    def __call__(
        self, functions: dict[str, RewardFunction], batch: Experience
    ) -> dict[str, list[Outcome]]:
        """Return the outcomes of the N rows, by function.

        Args:
            functions: Reward functions by name.
            batch: N rows with responses.
        """
        # All async functions start before the first result is awaited.
        pending = {name: self.start_call(function, batch) for name, function in functions.items()}
        return {
            name: list(self.outcomes(name, function, batch, pending[name]))
            for name, function in functions.items()
        }

    def outcomes(
        self, name: str, function: RewardFunction, batch: Experience, get_scores: Callable[[], Any]
    ) -> Iterator[Outcome]:
        """Yield one outcome per row. The first failure ends the run, or warns if skipped.

        Args:
            name: Name of the function.
            function: The function.
            batch: N rows.
            get_scores: Waits for the started call, and returns its scores.
        """
        batch_result = self.run_call(name, get_scores, len(batch))
        outcomes: Iterable[Outcome] = (
            self.score_rows_separately(name, function, batch, batch_result)
            if isinstance(batch_result, RowFailure)
            else batch_result
        )
        warned = False
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, RowFailure) and not warned:  # one warning per call is enough
                message = f"reward '{name}' {outcome.message}\n{format_row(batch, row)}"
                if not self.skip_failed_prompts:
                    raise RewardError(message) from outcome.cause
                warnings.warn(message, stacklevel=2)
                warned = True
            yield outcome

    def score_rows_separately(
        self, name: str, function: RewardFunction, batch: Experience, batch_result: RowFailure
    ) -> Iterator[Outcome]:
        """Score each row alone and yield its outcome. Stop after twice the time limit in total.

        Args:
            name: Name of the function.
            function: The function.
            batch: N rows.
            batch_result: The failure of the call with all rows.
        """
        start, num_tried = time.monotonic(), 0
        while num_tried < len(batch) and not self.is_timed_out(start):
            get_scores = self.start_call(function, batch.rows([num_tried]))
            row_result = self.run_call(name, get_scores, 1)
            num_tried += 1
            yield row_result if isinstance(row_result, RowFailure) else row_result[0]
        if not self.skip_failed_prompts:  # else the first failure has ended the run
            rows = "1 row" if num_tried == 1 else f"{num_tried} rows"
            text = f"reward '{name}' {batch_result.message}, but not for {rows} scored alone"
            raise RewardError(text) from batch_result.cause
        yield from [batch_result] * (len(batch) - num_tried)

    def is_timed_out(self, start: float) -> bool:
        """Return True if the time limit has passed since `start`, in monotonic seconds."""
        return self.timeout is not None and time.monotonic() - start > self.timeout

    def run_call(
        self, name: str, get_scores: Callable[[], Any], rows: int
    ) -> list[Outcome] | RowFailure:
        """Return the outcomes of a call. A result that is not one number per row ends the run.

        Args:
            name: Name of the function.
            get_scores: Waits for the started call, and returns its scores.
            rows: Number of rows of the call.
        """
        try:
            return check_scores(get_scores(), rows)
        except RewardError as error:
            raise RewardError(f"reward '{name}' {error}") from error.__cause__
        except torch.OutOfMemoryError:
            raise  # the phase names the settings; scoring row by row would not free memory
        except TimeoutError as error:
            if self.timeout is None or str(error):
                return RowFailure(describe_exception(error), error)
            count = "1 row" if rows == 1 else f"{rows} rows"
            return RowFailure(f"returned no scores for {count} in {self.timeout:g} s", error)
        except Exception as error:
            return RowFailure(describe_exception(error), error)

    def start_call(self, function: RewardFunction, batch: Experience) -> Callable[[], Any]:
        """Start an async function. Return a function that waits for it, or that runs another."""
        limit, call = self.timeout, partial(function, batch)
        if function.is_async:
            future = asyncio.run_coroutine_threadsafe(await_with_timeout(call, limit), self.loop)
            return partial(future.result, limit)
        if limit is None:
            return call
        return partial(run_in_thread, bind_thread_state(call, batch.responses.device), limit)

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the run. Clients with open connections need one and the same."""
        loop = asyncio.new_event_loop()
        Thread(target=run_event_loop, args=(loop,), daemon=True).start()
        return loop


def run_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run the event loop in its thread."""
    torch.set_grad_enabled(False)  # each thread has its own mode
    loop.run_forever()


async def await_with_timeout(call: Callable[[], Any], seconds: float | None) -> Any:
    """Return the result of an async function, or raise TimeoutError."""
    return await asyncio.wait_for(call(), seconds)


def bind_thread_state(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return the function with this thread's device and autocast, for a call in another thread."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run_with_state() -> Any:
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            return function()

    return run_with_state


def run_in_thread(function: Callable[[], Any], seconds: float) -> Any:
    """Return the function's result, or raise TimeoutError after `seconds`.

    A thread that hangs keeps running as a daemon, and does not delay the end of the process.

    Example:
        >>> run_in_thread(lambda: 2 + 2, seconds=5.0)
        4
    """
    future: Future[Any] = Future()

    def call_function() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    # Not a ThreadPoolExecutor: Python waits for its threads at exit, also for a hanging one.
    Thread(target=call_function, daemon=True).start()
    return future.result(seconds)


def check_scores(scores: Any, rows: int) -> list[Outcome]:
    """Return one outcome per row, or raise a `RewardError` if the form is wrong.

    Args:
        scores: Result of a reward function: a list, a tensor or an array of one number per row.
        rows: Number of rows of the call.

    Example:
        >>> check_scores(torch.tensor([0.5, 1.0]), rows=2), check_scores([2, None], rows=2)
        ([0.5, 1.0], [2.0, None])
    """
    if isinstance(scores, Tensor | np.ndarray):
        if scores.shape != (rows,):
            raise RewardError(f"returned shape {list(scores.shape)} instead of [{rows}]")
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise RewardError(f"returned {type(scores).__name__} instead of a list of numbers")
    if len(scores) != rows:
        raise RewardError(f"returned {len(scores)} scores instead of {rows}")
    return [None if score is None else finite_or_failure(score) for score in scores]


def finite_or_failure(score: Any) -> float | RowFailure:
    """Return the score as a finite float, or a `RowFailure`."""
    try:
        # float("1.0") would accept a text, which is more likely a mistake of the user's.
        number = math.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    failure = f"returned {shorten(repr(score))}, which is not a finite number"
    return number if math.isfinite(number) else RowFailure(failure)


def describe_exception(error: BaseException) -> str:
    """Return the error and its file and line, in one line."""
    kind, text = type(error).__name__, shorten(str(error), 300)
    frames = traceback.extract_tb(error.__traceback__)  # the last frame is the user's line
    location = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {kind}: {text}{location}" if text else f"raised {kind}{location}"


def format_row(batch: Experience, row: int) -> str:
    """Return a row's prompt and completion as two lines, shortened."""
    prompt, completion = (batch.columns[name][row] for name in ("prompt", "completion"))
    prompt, completion = shorten(last_turn(prompt)), shorten(last_turn(completion))
    return f"  prompt: {prompt}\n  completion: {completion}"


def shorten(text: str, max_length: int = 120) -> str:
    r"""Return a text on one line of at most `max_length` characters.

    Example:
        >>> shorten("a long\n text", max_length=9)
        'a long...'
    """
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[: max_length - 3]}..."

"""Calls reward functions so that a row that breaks one, or hangs it, ends in one clear error."""

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
    """Stands where a row's score should be.

    Args:
        message: Happened, as the rest of a sentence that starts with the function.
        cause: The exception, if there was one.
    """

    message: str
    cause: BaseException | None = None


Outcome = float | None | RowFailure


class RewardExecutor:
    """Calls functions, the async ones while the others run, and finds the row that breaks one.

    Args:
        timeout: Seconds that a call may take; None for no limit.
        skip_failed_prompts: Whether a failed row is handed back, instead of ending the run.
    """

    def __init__(self, timeout: float | None = None, skip_failed_prompts: bool = False):
        if timeout is not None and timeout <= 0:
            raise UserError(f"timeout must be above 0 seconds, not {timeout:g}")
        self.timeout, self.skip_failed_prompts = timeout, skip_failed_prompts

    def __call__(
        self, functions: dict[str, RewardFunction], batch: Experience
    ) -> dict[str, list[Outcome]]:
        """By function, what each of the N rows got."""
        pending = {name: self.start_call(function, batch) for name, function in functions.items()}
        return {
            name: list(self.outcomes(name, function, batch, pending[name]))
            for name, function in functions.items()
        }

    def outcomes(
        self, name: str, function: RewardFunction, batch: Experience, get_scores: Callable[[], Any]
    ) -> Iterator[Outcome]:
        """One per row; the first failure ends the run or, if they are skipped, is warned of."""
        batch_result = self.run_call(name, get_scores, len(batch))
        outcomes: Iterable[Outcome] = (
            self.score_rows_separately(name, function, batch, batch_result)
            if isinstance(batch_result, RowFailure)
            else batch_result
        )
        warned = False
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, RowFailure) and not warned:
                message = f"reward '{name}' {outcome.message}\n{format_row(batch, row)}"
                if not self.skip_failed_prompts:
                    raise RewardError(message) from outcome.cause
                warnings.warn(message, stacklevel=2)
                warned = True
            yield outcome

    def score_rows_separately(
        self, name: str, function: RewardFunction, batch: Experience, batch_result: RowFailure
    ) -> Iterator[Outcome]:
        """Asks again for each row alone, for at most twice the time limit in all."""
        start, num_tried = time.monotonic(), 0
        while num_tried < len(batch) and not self.is_timed_out(start):
            get_scores = self.start_call(function, batch.rows([num_tried]))
            row_result = self.run_call(name, get_scores, 1)
            num_tried += 1
            yield row_result if isinstance(row_result, RowFailure) else row_result[0]
        if not self.skip_failed_prompts:  # else the first failure has ended the run
            rows = "1 row" if num_tried == 1 else f"{num_tried} rows"
            text = f"reward '{name}' {batch_result.message}, though not for {rows} asked alone"
            raise RewardError(text) from batch_result.cause
        yield from [batch_result] * (len(batch) - num_tried)

    def is_timed_out(self, start: float) -> bool:
        """Whether the time limit has passed since `start`, in seconds of the monotonic clock."""
        return self.timeout is not None and time.monotonic() - start > self.timeout

    def run_call(
        self, name: str, get_scores: Callable[[], Any], rows: int
    ) -> list[Outcome] | RowFailure:
        """What a call came to; a result that is not one number per row ends the run."""
        try:
            return check_scores(get_scores(), rows)
        except RewardError as error:
            raise RewardError(f"reward '{name}' {error}") from error.__cause__
        except torch.OutOfMemoryError:
            raise  # the phase says what to change; row by row there would be no more room
        except TimeoutError as error:
            if self.timeout is None or str(error):
                return RowFailure(describe_exception(error), error)
            row_count = "1 row" if rows == 1 else f"{rows} rows"
            return RowFailure(f"gave no answer for {row_count} within {self.timeout:g} s", error)
        except Exception as error:
            return RowFailure(describe_exception(error), error)

    def start_call(self, function: RewardFunction, batch: Experience) -> Callable[[], Any]:
        """Starts an async function; what is returned waits for it, or runs any other function."""
        limit, call = self.timeout, partial(function, batch)
        if function.is_async:
            future = asyncio.run_coroutine_threadsafe(await_with_timeout(call, limit), self.loop)
            return partial(future.result, limit)
        if limit is None:
            return call
        return partial(run_in_thread, bind_thread_state(call, batch.responses.device), limit)

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """One event loop for the whole run, as clients with open connections expect."""
        loop = asyncio.new_event_loop()
        Thread(target=run_event_loop, args=(loop,), daemon=True).start()
        return loop


def run_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """The life of the event loop's thread."""
    torch.set_grad_enabled(False)  # the mode is each thread's own
    loop.run_forever()


async def await_with_timeout(call: Callable[[], Any], seconds: float | None) -> Any:
    """What an async function answers in time."""
    return await asyncio.wait_for(call(), seconds)


def bind_thread_state(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as it would run in this thread: another has its own device and modes."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run_with_state() -> Any:
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            return function()

    return run_with_state


def run_in_thread(function: Callable[[], Any], seconds: float) -> Any:
    """The function's result in time; a thread that hangs is left behind when the process ends."""
    future: Future[Any] = Future()

    def call_function() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=call_function, daemon=True).start()
    return future.result(seconds)


def check_scores(scores: Any, rows: int) -> list[Outcome]:
    """One outcome per row of what a function returned."""
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
    """A number that one can train on."""
    try:
        number = math.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else RowFailure(f"returned {shorten(repr(score))}")


def describe_exception(error: BaseException) -> str:
    """What happened and where, in one line."""
    kind, text = type(error).__name__, shorten(str(error), 300)
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {kind}: {text}{location}" if text else f"raised {kind}{location}"


def format_row(batch: Experience, row: int) -> str:
    """Two lines for the user: a row's prompt and completion, shortened."""
    prompt, completion = (batch.columns[name][row] for name in ("prompt", "completion"))
    prompt, completion = shorten(last_turn(prompt)), shorten(last_turn(completion))
    return f"  prompt: {prompt}\n  completion: {completion}"


def shorten(text: str, max_length: int = 120) -> str:
    """A text on one line of at most `max_length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[: max_length - 3]}..."

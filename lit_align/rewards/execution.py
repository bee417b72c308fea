"""Calls reward sources so that a row that breaks one, or hangs it, ends in one clear error."""

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
from lit_align.rewards.base import RewardError, RewardFunction, last_turn


@dataclass(frozen=True)
class Failure:
    """Stands where a row's score should be.

    Args:
        what: Happened, as the rest of a sentence that starts with the source.
        cause: The exception, if there was one.
    """

    what: str
    cause: BaseException | None = None


Outcome = float | None | Failure


class Caller:
    """Calls sources, the async ones while the others run, and finds the row that breaks one.

    Args:
        time_limit: Seconds that a call may take; None for no limit.
        skip_failures: Whether a failed row is handed back, instead of ending the run.
    """

    def __init__(self, time_limit: float | None = None, skip_failures: bool = False):
        if time_limit is not None and time_limit <= 0:
            raise ValueError(f"time_limit must be above 0 seconds, not {time_limit:g}")
        self.time_limit, self.skip_failures = time_limit, skip_failures

    def __call__(
        self, sources: dict[str, RewardFunction], batch: Experience
    ) -> dict[str, list[Outcome]]:
        """By source, what each of the N rows got."""
        answers = {name: self.begin(source, batch) for name, source in sources.items()}
        return {
            name: list(self.outcomes(name, source, batch, answers[name]))
            for name, source in sources.items()
        }

    def outcomes(
        self, name: str, source: RewardFunction, batch: Experience, answer: Callable[[], Any]
    ) -> Iterator[Outcome]:
        """One per row; the first failure ends the run or, if they are skipped, is warned of."""
        whole = self.attempt(name, answer, len(batch))
        outcomes: Iterable[Outcome] = (
            self.row_by_row(name, source, batch, whole) if isinstance(whole, Failure) else whole
        )
        warned = False
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure) and not warned:
                message = f"reward '{name}' {outcome.what}\n{shown(batch, row)}"
                if not self.skip_failures:
                    raise RewardError(message) from outcome.cause
                warnings.warn(message, stacklevel=2)
                warned = True
            yield outcome

    def row_by_row(
        self, name: str, source: RewardFunction, batch: Experience, whole: Failure
    ) -> Iterator[Outcome]:
        """Asks again for each row alone, for at most twice the time limit in all."""
        start, tried = time.monotonic(), 0
        while tried < len(batch) and not self.is_up(start):
            answer = self.begin(source, batch.rows([tried]))
            alone = self.attempt(name, answer, 1)
            tried += 1
            yield alone if isinstance(alone, Failure) else alone[0]
        if not self.skip_failures:  # else the first failure has ended the run
            rows = "1 row" if tried == 1 else f"{tried} rows"
            text = f"reward '{name}' {whole.what}, though not for {rows} asked alone"
            raise RewardError(text) from whole.cause
        yield from [whole] * (len(batch) - tried)

    def is_up(self, start: float) -> bool:
        """Whether the time limit has passed since `start`, in seconds of the monotonic clock."""
        return self.time_limit is not None and time.monotonic() - start > self.time_limit

    def attempt(self, name: str, answer: Callable[[], Any], rows: int) -> list[Outcome] | Failure:
        """What a call came to; a result that is not one number per row ends the run."""
        try:
            return checked(answer(), rows)
        except RewardError as error:
            raise RewardError(f"reward '{name}' {error}") from error.__cause__
        except torch.OutOfMemoryError:
            raise  # the phase says what to change; row by row there would be no more room
        except TimeoutError as error:
            if self.time_limit is None or str(error):
                return Failure(raised(error), error)
            many = "1 row" if rows == 1 else f"{rows} rows"
            return Failure(f"gave no answer for {many} within {self.time_limit:g} s", error)
        except Exception as error:
            return Failure(raised(error), error)

    def begin(self, source: RewardFunction, batch: Experience) -> Callable[[], Any]:
        """Starts an async source; what is returned waits for it, or runs any other source."""
        limit, call = self.time_limit, partial(source, batch)
        if source.is_async:
            future = asyncio.run_coroutine_threadsafe(awaited(call, limit), self.loop)
            return partial(future.result, limit)
        if limit is None:
            return call
        return partial(in_thread, as_here(call, batch.responses.device), limit)

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """One event loop for the whole run, as clients with open connections expect."""
        loop = asyncio.new_event_loop()
        Thread(target=run_forever, args=(loop,), daemon=True).start()
        return loop


def run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """The life of the event loop's thread."""
    torch.set_grad_enabled(False)  # the mode is each thread's own
    loop.run_forever()


async def awaited(call: Callable[[], Any], seconds: float | None) -> Any:
    """What an async source answers in time."""
    return await asyncio.wait_for(call(), seconds)


def as_here(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as it would run in this thread: another has its own device and modes."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def there() -> Any:
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            return function()

    return there


def in_thread(function: Callable[[], Any], seconds: float) -> Any:
    """The function's result in time; a thread that hangs is left behind when the process ends."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result(seconds)


def checked(scores: Any, rows: int) -> list[Outcome]:
    """One outcome per row of what a source returned."""
    if isinstance(scores, Tensor | np.ndarray):
        if scores.shape != (rows,):
            raise RewardError(f"returned shape {list(scores.shape)} instead of [{rows}]")
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise RewardError(f"returned {type(scores).__name__} instead of a list of numbers")
    if len(scores) != rows:
        raise RewardError(f"returned {len(scores)} scores instead of {rows}")
    return [None if score is None else finite(score) for score in scores]


def finite(score: Any) -> float | Failure:
    """A number that one can train on."""
    try:
        number = math.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else Failure(f"returned {shortened(repr(score))}")


def raised(error: BaseException) -> str:
    """What happened and where, in one line."""
    kind, text = type(error).__name__, shortened(str(error), 300)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {kind}: {text}{place}" if text else f"raised {kind}{place}"


def shown(batch: Experience, row: int) -> str:
    """Two lines for the user: a row's prompt and completion, shortened."""
    prompt, completion = (batch.columns[name][row] for name in ("prompt", "completion"))
    prompt, completion = shortened(last_turn(prompt)), shortened(last_turn(completion))
    return f"  prompt: {prompt}\n  completion: {completion}"


def shortened(text: str, most: int = 120) -> str:
    """A text on one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."

"""Execution of reward functions: results, failures, time limits, async calls and threads."""

import asyncio
import math
import threading

import numpy as np
import pytest
import torch

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import (
    RewardExecutor,
    RowFailure,
    check_scores,
    run_in_thread,
    shorten,
)


def batch_of(*completions: str) -> Experience:
    """Return rows with these completions."""
    rows = len(completions)
    prompts = [f"prompt {row}" for row in range(rows)]
    return Experience(
        {"prompt": prompts, "completion": list(completions)}, responses=torch.zeros(rows, 1)
    )


class TextReward(RewardFunction):
    """Scores each completion by a function of its text."""

    def __init__(self, function):
        self.function = function

    def __call__(self, batch):
        return [self.function(text) for text in batch.columns["completion"]]


class AsyncTextReward(TextReward):
    """Scores each completion by an async function of its text."""

    async def __call__(self, batch):
        return [await self.function(text) for text in batch.columns["completion"]]


def call(function, batch, **settings):
    """Return the outcomes of a function that is called `judge`."""
    return RewardExecutor(**settings)({"judge": function}, batch)["judge"]


def raise_if_bad(text: str) -> float:
    if text == "bad":
        raise KeyError("no such verdict")
    return float(len(text))


def hang_if_bad(text: str) -> float:
    if text == "bad":
        threading.Event().wait()  # never set
    return float(len(text))


async def hang_if_bad_async(text: str) -> float:
    if text == "bad":
        await asyncio.Event().wait()
    return float(len(text))


@pytest.mark.parametrize("settings", [{}, {"timeout": 5.0}])
def test_numbers_become_floats_and_none_is_kept(settings):
    outcomes = call(
        TextReward({"a": 1, "b": None, "c": True}.get), batch_of("a", "b", "c"), **settings
    )
    assert outcomes == [1.0, None, 1.0]


def test_tensors_and_arrays_are_accepted():
    assert check_scores(torch.tensor([0.5, 1.0], dtype=torch.bfloat16), 2) == [0.5, 1.0]
    assert check_scores(np.array([1, 2]), 2) == [1.0, 2.0]
    assert check_scores([torch.tensor(0.5), np.float32(0.25)], 2) == [0.5, 0.25]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "reward 'judge' returned 1 scores instead of 2"),
        (None, "reward 'judge' returned NoneType instead of a list of numbers"),
        ("ab", "reward 'judge' returned str instead of a list of numbers"),
        (torch.zeros(2, 1), r"reward 'judge' returned shape \[2, 1\] instead of \[2\]"),
    ],
)
def test_a_result_of_another_form_always_ends_the_run(result, message):
    class Malformed(RewardFunction):
        def __call__(self, batch):
            return result

    with pytest.raises(RewardError, match=message):
        call(Malformed(), batch_of("a", "b"), skip_failed_prompts=True)


def test_the_message_names_the_row_on_which_a_function_raises():
    with pytest.raises(RewardError) as caught:
        call(TextReward(raise_if_bad), batch_of("good", "bad", "bad"))
    failure, *row = str(caught.value).splitlines()
    assert failure.startswith("reward 'judge' raised KeyError: 'no such verdict' (")
    assert "test_execution.py:" in failure  # file and line of the user's function
    assert row == ["  prompt: prompt 1", "  completion: bad"]
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [math.nan, -math.inf, "good", [1.0]])
def test_the_message_names_the_row_whose_score_is_not_a_number(value):
    with pytest.raises(RewardError) as caught:
        call(TextReward({"a": 1.0, "b": value}.get), batch_of("a", "b"))
    first, prompt, completion = str(caught.value).split("\n")
    assert first == f"reward 'judge' returned {value!r}, which is not a finite number"
    assert (prompt, completion) == ("  prompt: prompt 1", "  completion: b")


@pytest.mark.parametrize("function", [TextReward(hang_if_bad), AsyncTextReward(hang_if_bad_async)])
def test_the_message_names_the_row_that_hangs(function):
    with pytest.raises(RewardError) as caught:
        call(function, batch_of("a", "bad"), timeout=0.4)
    assert str(caught.value) == (
        "reward 'judge' returned no scores for 1 row in 0.4 s\n"
        "  prompt: prompt 1\n  completion: bad"
    )


def test_a_failure_of_all_rows_together_is_reported_as_such():
    class OneRowOnly(RewardFunction):
        def __call__(self, batch):
            if len(batch) > 1:
                raise MemoryError("too many")
            return [1.0]

    message = r"raised MemoryError: too many \(.*\), but not for 2 rows scored alone"
    with pytest.raises(RewardError, match=message):
        call(OneRowOnly(), batch_of("a", "b"))
    assert call(OneRowOnly(), batch_of("a", "b"), skip_failed_prompts=True) == [1.0, 1.0]


def test_skipped_failures_are_returned_with_a_warning():
    with pytest.warns(UserWarning, match="raised KeyError"):
        good, bad = call(
            TextReward(raise_if_bad), batch_of("good", "bad"), skip_failed_prompts=True
        )
    assert good == 4.0
    assert isinstance(bad, RowFailure)


def test_scoring_row_by_row_ends_at_the_time_limit():
    with pytest.warns(UserWarning, match="returned no scores"):
        outcomes = call(
            TextReward(hang_if_bad),
            batch_of("a", "bad", "b"),
            timeout=0.4,
            skip_failed_prompts=True,
        )
    assert outcomes[0] == 1.0
    assert [type(outcome) for outcome in outcomes[1:]] == [RowFailure, RowFailure]
    assert outcomes[2].message == "returned no scores for 3 rows in 0.4 s"


def test_async_functions_run_while_the_others_do():
    """Each function waits for the others, so that one after the other they would never end."""
    started = {name: threading.Event() for name in ("sync", "one", "two")}

    async def wait_async(name):
        started[name].set()
        while not all(event.is_set() for event in started.values()):
            await asyncio.sleep(0.001)
        return 1.0

    def wait(text):
        started["sync"].set()
        return 2.0 if all(event.wait(60) for event in started.values()) else 0.0

    functions = {
        "sync": TextReward(wait),
        "one": AsyncTextReward(lambda text: wait_async("one")),
        "two": AsyncTextReward(lambda text: wait_async("two")),
    }
    assert RewardExecutor()(functions, batch_of("a")) == {"sync": [2.0], "one": [1.0], "two": [1.0]}


def test_async_functions_keep_their_event_loop():
    async def loop_id(text):
        return float(id(asyncio.get_running_loop()))

    executor, functions = RewardExecutor(), {"judge": AsyncTextReward(loop_id)}
    assert executor(functions, batch_of("a")) == executor(functions, batch_of("a"))


@pytest.mark.parametrize("settings", [{}, {"timeout": 5.0}])
def test_a_function_has_the_modes_of_the_caller_in_any_thread(settings):
    class Product(RewardFunction):
        def __call__(self, batch):
            weight = torch.ones(2, 2, requires_grad=True)
            product = weight @ weight
            return [float(product.requires_grad), float(product.dtype == torch.bfloat16)]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert call(Product(), batch_of("a", "b"), **settings) == [0.0, 1.0]


def test_a_thread_that_hangs_is_a_daemon():
    before, event = threading.enumerate(), threading.Event()
    with pytest.raises(TimeoutError):
        run_in_thread(event.wait, 0.1)
    hanging = [thread for thread in threading.enumerate() if thread not in before]
    assert [thread.daemon for thread in hanging] == [True]
    event.set()


def test_long_texts_are_shortened_to_one_line():
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 200) == "x" * 117 + "..."


def test_a_timeout_of_zero_is_refused():
    with pytest.raises(UserError, match=r"timeout must be above 0 seconds, found 0. Set --reward"):
        RewardExecutor(timeout=0.0)

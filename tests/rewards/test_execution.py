import asyncio
import math
import threading
import time

import numpy as np
import pytest
import torch

from lit_align.batches import Experience
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.execution import (
    RewardExecutor,
    RowFailure,
    check_scores,
    run_in_thread,
    shorten,
)


def answered(*completions: str) -> Experience:
    rows = len(completions)
    prompts = [f"prompt {row}" for row in range(rows)]
    return Experience(
        {"prompt": prompts, "completion": list(completions)}, responses=torch.zeros(rows, 1)
    )


class Judge(RewardFunction):
    """Scores each completion by a function of its text."""

    def __init__(self, function):
        self.function = function

    def __call__(self, batch):
        return [self.function(text) for text in batch.columns["completion"]]


class AsyncJudge(Judge):
    """The same, later."""

    async def __call__(self, batch):
        return [await self.function(text) for text in batch.columns["completion"]]


def call(source, batch, **settings):
    return RewardExecutor(**settings)({"judge": source}, batch)["judge"]


def fragile(text: str) -> float:
    if text == "bad":
        raise KeyError("no such verdict")
    return float(len(text))


def slow(text: str) -> float:
    time.sleep(30 if text == "bad" else 0)
    return float(len(text))


async def slow_async(text: str) -> float:
    await asyncio.sleep(30 if text == "bad" else 0)
    return float(len(text))


@pytest.mark.parametrize("settings", [{}, {"timeout": 5.0}])
def test_numbers_come_back_as_floats_and_none_stays(settings):
    outcomes = call(Judge({"a": 1, "b": None, "c": True}.get), answered("a", "b", "c"), **settings)
    assert outcomes == [1.0, None, 1.0]


def test_tensors_and_arrays_are_lists_too():
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
def test_a_result_of_another_form_ends_the_run_even_if_failures_are_skipped(result, message):
    class Malformed(RewardFunction):
        def __call__(self, batch):
            return result

    with pytest.raises(RewardError, match=message):
        call(Malformed(), answered("a", "b"), skip_failed_prompts=True)


def test_the_row_on_which_a_source_raises_is_found():
    with pytest.raises(RewardError) as caught:
        call(Judge(fragile), answered("good", "bad", "bad"))
    what, *row = str(caught.value).splitlines()
    assert what.startswith("reward 'judge' raised KeyError: 'no such verdict' (")
    assert "test_execution.py:" in what  # where the user's function broke
    assert row == ["  prompt: prompt 1", "  completion: bad"]
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [math.nan, -math.inf, "good", [1.0]])
def test_what_is_no_number_is_shown_with_its_row(value):
    with pytest.raises(RewardError) as caught:
        call(Judge({"a": 1.0, "b": value}.get), answered("a", "b"))
    first, prompt, completion = str(caught.value).split("\n")
    assert first == f"reward 'judge' returned {value!r}"
    assert (prompt, completion) == ("  prompt: prompt 1", "  completion: b")


@pytest.mark.parametrize("source", [Judge(slow), AsyncJudge(slow_async)])
def test_the_row_that_hangs_is_found_within_twice_the_limit(source):
    start = time.monotonic()
    with pytest.raises(RewardError) as caught:
        call(source, answered("a", "bad"), timeout=0.4)
    assert time.monotonic() - start < 5.0
    assert str(caught.value) == (
        "reward 'judge' gave no answer for 1 row within 0.4 s\n"
        "  prompt: prompt 1\n  completion: bad"
    )


def test_a_failure_of_the_rows_together_is_told_as_such():
    class Crowd(RewardFunction):
        def __call__(self, batch):
            if len(batch) > 1:
                raise MemoryError("too many")
            return [1.0]

    told = r"raised MemoryError: too many \(.*\), though not for 2 rows"
    with pytest.raises(RewardError, match=told):
        call(Crowd(), answered("a", "b"))
    assert call(Crowd(), answered("a", "b"), skip_failed_prompts=True) == [1.0, 1.0]


def test_skipped_failures_are_handed_back_and_warned_of():
    with pytest.warns(UserWarning, match="raised KeyError"):
        good, bad = call(Judge(fragile), answered("good", "bad"), skip_failed_prompts=True)
    assert good == 4.0
    assert isinstance(bad, RowFailure)


def test_asking_row_by_row_ends_when_time_is_up():
    start = time.monotonic()
    with pytest.warns(UserWarning, match="gave no answer"):
        outcomes = call(
            Judge(slow), answered("a", "bad", "b"), timeout=0.4, skip_failed_prompts=True
        )
    assert time.monotonic() - start < 5.0
    assert outcomes[0] == 1.0
    assert [type(outcome) for outcome in outcomes[1:]] == [RowFailure, RowFailure]
    assert outcomes[2].message == "gave no answer for 3 rows within 0.4 s"


def test_async_sources_run_while_the_others_do():
    async def nap(text):
        await asyncio.sleep(0.3)
        return 1.0

    def doze(text):
        time.sleep(0.3)
        return 2.0

    functions = {"sync": Judge(doze), "one": AsyncJudge(nap), "two": AsyncJudge(nap)}
    start = time.monotonic()
    assert RewardExecutor()(functions, answered("a")) == {"sync": [2.0], "one": [1.0], "two": [1.0]}
    assert time.monotonic() - start < 0.8


def test_async_sources_keep_their_event_loop():
    async def loop_id(text):
        return float(id(asyncio.get_running_loop()))

    executor, functions = RewardExecutor(), {"judge": AsyncJudge(loop_id)}
    assert executor(functions, answered("a")) == executor(functions, answered("a"))


@pytest.mark.parametrize("settings", [{}, {"timeout": 5.0}])
def test_a_model_sees_the_caller_s_modes_in_any_thread(settings):
    class Product(RewardFunction):
        def __call__(self, batch):
            weight = torch.ones(2, 2, requires_grad=True)
            product = weight @ weight
            return [float(product.requires_grad), float(product.dtype == torch.bfloat16)]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert call(Product(), answered("a", "b"), **settings) == [0.0, 1.0]


def test_a_thread_that_hangs_does_not_keep_the_process():
    before = threading.enumerate()
    with pytest.raises(TimeoutError):
        run_in_thread(lambda: time.sleep(30), 0.1)
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert [thread.daemon for thread in left] == [True]


def test_long_texts_are_shortened_to_one_line():
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 200) == "x" * 117 + "..."


def test_a_timeout_is_above_zero():
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, not 0"):
        RewardExecutor(timeout=0.0)

"""A user's function as a reward: arguments, imports and messages."""

import asyncio
import inspect

import pytest
import torch

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardError
from lit_align.rewards.function import FunctionReward

SOURCE = """
from dataclasses import dataclass

import neighbour

pi = 3.14

@dataclass
class Judge:
    weight: float = 2.0

    def __call__(self, completions, **kwargs):
        return [self.weight * len(text) for text in completions]

judge = Judge()

def everything(prompts, completions, completion_ids, **columns):
    return prompts, completions, completion_ids, columns

def length(completions):
    return [neighbour.double * float(len(text)) for text in completions]

def wants_more(completions, verdict):
    return [0.0] * len(completions)

async def later(completions, answer, unknown=1):
    return [float(text == true) for text, true in zip(completions, answer)]
"""


@pytest.fixture
def batch() -> Experience:
    return Experience(
        {"prompt": ["p", "q"], "completion": ["a", "bb"], "answer": ["a", "b"]},
        responses=torch.tensor([[5, 1, 0], [6, 7, 1]]),
        response_lengths=[2, 3],
    )


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "neighbour.py").write_text("double = 2\n")
    path = tmp_path / "judges.py"
    path.write_text(SOURCE)
    return str(path)


def test_a_function_receives_the_arguments_of_trl(batch, file):
    assert FunctionReward(f"{file}:everything")(batch) == (
        ["p", "q"],
        ["a", "bb"],
        [[5, 1], [6, 7, 1]],
        {"answer": ["a", "b"]},
    )


def test_only_arguments_that_are_accepted_are_passed(batch, file):
    reward = FunctionReward(f"{file}:length")
    assert reward.name == "length"
    assert not reward.is_async
    assert reward(batch) == [2.0, 4.0]


def test_a_callable_object_is_accepted(batch, file):
    reward = FunctionReward(f"{file}:judge")
    assert reward.name == "Judge"
    assert reward(batch) == [2.0, 4.0]


def test_an_async_function_returns_a_coroutine(batch, file):
    reward = FunctionReward(f"{file}:later")
    scores = reward(batch)
    assert reward.is_async
    assert inspect.iscoroutine(scores)
    assert asyncio.run(scores) == [1.0, 0.0]


def test_modules_of_the_current_folder_are_found(batch, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # undone after the test
    assert FunctionReward("judges.length")(batch) == [2.0, 4.0]


def test_a_missing_argument_is_named(batch, file):
    with pytest.raises(RewardError, match=r"needs the argument 'verdict'.* only: answer, prompts"):
        FunctionReward(f"{file}:wants_more")(batch)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "there is no module in this path. Set --reward.functions.function"),
        ("no_such_module.length", "cannot import no_such_module: .*No module named 'no_such_mod"),
        ("nowhere.py:length", "cannot import nowhere.py: FileNotFoundError: no such file"),
        ("math.no_such_name", "math has no 'no_such_name'"),
        ("math.pi", "'pi' is a float, not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(path, message):
    with pytest.raises(UserError, match=f"reward function '{path}': {message}") as caught:
        FunctionReward(path)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_users_file_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"cannot import .*broken.py: ZeroDivisionError"):
        FunctionReward(f"{tmp_path}/broken.py:length")

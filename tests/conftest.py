"""Fixtures for all tests."""

import os
import socket
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Trainer
from spawn_ranks import Ranks
from tiny_models import RandomPrompts, tiny, trainer

from lit_align.batches import Experience
from lit_align.models.policy import Policy

torch.set_num_threads(1)  # two threads wait for each other when a machine is busy


@pytest.fixture(autouse=True)
def remove_seed_variable() -> Iterator[None]:
    """Remove the seed that Lightning leaves in the environment for ranks that start later."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def tiny_policy() -> Policy:
    """Llama of two blocks with the same random weights in every test."""
    return tiny()


@pytest.fixture
def prompts() -> Experience:
    """Four prompts of 3, 5, 1 and 4 tokens, left-padded to 5."""
    lengths = [3, 5, 1, 4]
    ids = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) >= 5 - torch.tensor(lengths).unsqueeze(1)
    return Experience(
        columns={"prompt": ["a", "b", "c", "d"]},
        prompts=ids.where(mask, 0),
        prompt_mask=mask,
        prompt_lengths=lengths,
    )


@pytest.fixture
def run(tmp_path):
    """Function that runs an algorithm on random prompts and returns the trainer."""

    def go(algorithm, num_batches: int = 3, **settings) -> Trainer:
        torch.manual_seed(0)
        done = trainer(tmp_path, **settings)
        done.fit(algorithm, RandomPrompts(num_batches))
        return done

    return go


@pytest.fixture
def port() -> int:
    """Free port of the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def start_ranks(processes: int = 2) -> Iterator[Ranks]:
    """Yield ranks that wait for functions, and end them afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ranks = Ranks(processes, number)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two ranks that the tests of a file share."""
    yield from start_ranks()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Four ranks that the tests of a file share."""
    yield from start_ranks(4)


@pytest.fixture
def new_ranks() -> Iterator[Ranks]:
    """Two new ranks for one test, with memory that no other test used."""
    yield from start_ranks()

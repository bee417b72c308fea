"""Ranks that tests of sharding share."""

import socket
from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture
def port() -> int:
    """A free one on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def started(processes: int = 2) -> Iterator[Ranks]:
    """So many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ranks = Ranks(processes, number)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Shared by the tests of a file."""
    yield from started()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Twice as many."""
    yield from started(4)


@pytest.fixture
def new_ranks() -> Iterator[Ranks]:
    """A test's own, with memory that nobody has used."""
    yield from started()

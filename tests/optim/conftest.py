"""Two ranks for the tests of sharded optimizers."""

import socket
from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    yield ranks
    ranks.close()

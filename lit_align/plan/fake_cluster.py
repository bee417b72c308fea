"""Fake cluster: rank 0 of N ranks in a process group whose other ranks do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import distributed

# Private to torch; checked with 2.13.
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


class FakeCluster(ClusterEnvironment):
    """Environment of rank 0 of N ranks. Lightning starts no other processes.

    Args:
        ranks: Number of ranks, N.
        per_node: Number of ranks per node.

    Example:
        >>> cluster = FakeCluster(ranks=16, per_node=8)
        >>> cluster.world_size(), cluster.global_rank()
        (16, 0)
    """

    def __init__(self, ranks: int, per_node: int):
        super().__init__()
        self.ranks, self.per_node = ranks, per_node

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0

    @staticmethod
    def detect() -> bool:
        """Return False, so that Lightning never selects this environment itself."""
        return False

    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.ranks

    def set_world_size(self, size: int) -> None:
        """Do nothing: the number of ranks is an argument of the constructor."""

    def global_rank(self) -> int:
        """Return 0: the first rank has the largest shards."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the rank is always 0."""

    def local_rank(self) -> int:
        """Return 0, the rank within the node."""
        return 0

    def node_rank(self) -> int:
        """Return 0, the rank of the node."""
        return 0


@contextmanager
def fake_process_group(ranks: int) -> Iterator[None]:
    """Open a process group whose collectives return without communication.

    Args:
        ranks: Number of ranks.
    """
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # Equal meshes share the cached results of DTensor, which depend on the rank.
        _clear_sharding_prop_cache()

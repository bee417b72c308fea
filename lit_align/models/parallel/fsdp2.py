"""Sharded training as a strategy of Lightning's: one word, and data parallelism alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry  # lightning 2.6
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_align.errors import UserError
from lit_align.models.parallel.sharding import ShardingConfig
from lit_align.models.weights.state_dict_check import check_state_dict, checkpoint_shapes

STRATEGY_NAMES: Mapping[str, dict[str, bool]] = {
    "fsdp2": {},
    "fsdp2_cpu_offload": {"cpu_offload": True},
}


class FSDP2(ModelParallelStrategy):
    """Every rank keeps a share of weights, gradients and optimizer state (arXiv:2304.11277).

    Blocks and roots are split by the algorithm, once they are built; Lightning's own default for
    the parent is tensor parallelism, which is never used here. `--trainer.strategy fsdp2`.

    Args:
        num_replicas: Copies of all shards. 1 splits over all ranks; 0 makes a copy per node, so
            that weights are gathered within a node and only gradients cross the network.
        cpu_offload: Keep shards and optimizer state in host memory between uses, and step there.
        activation_checkpointing: Keep only the inputs of all networks' blocks, recompute the rest.
        gather_for_generation: Whether generation first gathers all weights, instead of each block
            each time; by default where an estimate says that they fit.
        sync_every_microbatch: Average gradients over the ranks after each micro-batch, so that a rank
            never holds more than its shard and one block. Default: once per step, which sends less
            and holds unsharded gradients until then.
    """

    def __init__(
        self,
        num_replicas: int = 1,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        gather_for_generation: bool | None = None,
        sync_every_microbatch: bool = False,
        **kwargs: Any,
    ):
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **kwargs)
        if num_replicas < 0:
            raise UserError(f"num_replicas is 0 (one per node) or more, found {num_replicas}.")
        self.num_replicas, self.cpu_offload = num_replicas, cpu_offload
        self.activation_checkpointing, self.gather_for_generation, self.sync_every_microbatch = (
            activation_checkpointing,
            gather_for_generation,
            sync_every_microbatch,
        )

    @property
    def sharding(self) -> ShardingConfig:
        """How networks are split: what the precision asks for and the settings say."""
        # reductions of halves are in fp32: a sum over many ranks would lose the small gradients
        mixed = isinstance(self.precision_plugin, MixedPrecision)
        half = isinstance(self.precision_plugin, HalfPrecision)
        return ShardingConfig(
            param_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32 if mixed or half else None,
            cpu_offload=self.cpu_offload,
            activation_checkpointing=self.activation_checkpointing,
            gather_for_generation=self.gather_for_generation,
            sync_every_microbatch=self.sync_every_microbatch,
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Start the process group and build the mesh: one dimension, or replicas x shards.

        Lightning has no setting for such a mesh: its private attributes are set here, as its own
        method of this name sets them (checked with lightning 2.6).
        """
        self._data_parallel_size = self.world_size
        super().setup_environment()
        copies = self.num_replicas or self.num_nodes
        if self.world_size % copies:
            raise UserError(
                f"num_replicas {copies} does not divide {self.world_size} ranks into equal groups."
            )
        if copies > 1:
            sizes, names = (copies, self.world_size // copies), ("replicate", "shard")
            mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
            self._device_mesh = mesh
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = mesh

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Open a meta device context: networks built inside read their weights when sharded.

        Only then is it known which rank needs which rows. Lightning opens the context around
        `configure_model`.
        """
        with torch.device("meta"):
            yield

    def model_to_device(self) -> None:
        """Moves what is not sharded; shards are in their place, which may be host memory."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Looks at names and shapes first: torch's own refusals are tracebacks on every rank."""
        if Path(checkpoint_path).is_dir():
            assert self.lightning_module is not None
            check_state_dict(self.lightning_module, checkpoint_shapes(Path(checkpoint_path)))
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _get_process_group_backend(self) -> str:
        """Add gloo for offloaded gradients, which are clipped on the host: nccl cannot reach it.

        A private method of Lightning, checked with lightning 2.6.
        """
        if self.cpu_offload and self.root_device.type == "cuda":
            return self._process_group_backend or "cuda:nccl,cpu:gloo"
        return super()._get_process_group_backend()

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """The words for `Trainer(strategy=...)`."""
        for word, settings in STRATEGY_NAMES.items():
            strategy_registry.register(word, cls, description=cls.__name__, **settings)


if not set(STRATEGY_NAMES) & set(StrategyRegistry):
    FSDP2.register_strategies(StrategyRegistry)

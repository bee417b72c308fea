"""Lightning strategy for sharded data-parallel training by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry  # private, lightning 2.6.6
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_align.errors import UserError
from lit_align.models.parallel.sharding import ShardingConfig
from lit_align.models.weights.state_dict_check import check_state_dict, checkpoint_shapes

# Names for `--trainer.strategy`, and the arguments that each sets.
STRATEGY_NAMES: Mapping[str, dict[str, bool]] = {
    "fsdp2": {},
    "fsdp2_cpu_offload": {"cpu_offload": True},
}


class FSDP2(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state over all ranks (FSDP, arXiv:2304.11277).

    The algorithm splits each network after building it. Use `--trainer.strategy fsdp2`.

    Args:
        num_replicas: Number of copies of the shards. 1 splits the weights over all ranks. 0 keeps
            one copy per node: weights are gathered within a node, and only gradients cross nodes.
        cpu_offload: Keep shards and optimizer state in host memory, and run the optimizer there.
        activation_checkpointing: Keep only the inputs of each block and recompute the rest in
            backward, in all networks.
        gather_for_generation: True gathers all weights before a rollout. False gathers each block
            for each token. Default: gather if an estimate of the free memory allows it.
        sync_every_microbatch: Average gradients over the ranks after each micro-batch, so that a
            rank never holds unsharded gradients. Default: once per optimizer step, which sends
            less data.
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
        # Placeholders until the ranks are known. Lightning's default, auto, is tensor parallelism.
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **kwargs)
        if num_replicas < 0:
            raise UserError(
                f"num_replicas must be 0 (one per node) or more, found {num_replicas}. "
                f"Set --trainer.strategy.num_replicas."
            )
        self.num_replicas, self.cpu_offload = num_replicas, cpu_offload
        self.activation_checkpointing, self.gather_for_generation, self.sync_every_microbatch = (
            activation_checkpointing,
            gather_for_generation,
            sync_every_microbatch,
        )

    @property
    def sharding(self) -> ShardingConfig:
        """Return the settings of the split, with the dtypes of the trainer's precision."""
        # Half-precision gradients are summed in fp32: a sum over many ranks rounds small ones away.
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
        """Return the arguments of a sampler that gives each rank its own rows."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Start the process group and build the mesh of ranks, or of replicas x shards."""
        # Lightning has no setting for a mesh of two dimensions. Its private attributes are set as
        # its own method of this name sets them (checked with lightning 2.6.6).
        self._data_parallel_size = self.world_size
        super().setup_environment()
        copies = self.num_replicas or self.num_nodes
        if self.world_size % copies:
            raise UserError(
                f"num_replicas {copies} does not divide {self.world_size} ranks into equal groups. "
                f"Set --trainer.strategy.num_replicas to a divisor."
            )
        if copies > 1:
            sizes, names = (copies, self.world_size // copies), ("replicate", "shard")
            mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
            self._device_mesh = mesh
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = mesh

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Open a meta device context, in which networks are built without weights.

        Lightning opens it around `configure_model`.
        """
        # Weights are read after the split, when each rank knows which rows it needs.
        with torch.device("meta"):
            yield

    def model_to_device(self) -> None:
        """Move the tensors that are not sharded to the device of this rank."""
        # Shards have been placed by the split. With cpu_offload they must stay in host memory.
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint after checking its names and shapes.

        Args:
            checkpoint_path: File, or folder of shards.
            weights_only: Passed to Lightning.

        Returns:
            The checkpoint without its weights.
        """
        # torch would refuse a wrong checkpoint by a traceback on every rank.
        if Path(checkpoint_path).is_dir():
            assert self.lightning_module is not None
            check_state_dict(self.lightning_module, checkpoint_shapes(Path(checkpoint_path)))
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _get_process_group_backend(self) -> str:
        """Return the backend of the process group, with gloo for offloaded gradients.

        A private method of Lightning, checked with lightning 2.6.6.
        """
        # Offloaded gradients are clipped on the host, and nccl only reduces GPU tensors.
        if self.cpu_offload and self.root_device.type == "cuda":
            return self._process_group_backend or "cuda:nccl,cpu:gloo"
        return super()._get_process_group_backend()

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the names for `Trainer(strategy=...)`.

        Args:
            strategy_registry: Lightning's registry of strategies.
        """
        for name, settings in STRATEGY_NAMES.items():
            strategy_registry.register(name, cls, description=cls.__name__, **settings)


# The registry refuses a name that it has already, for example after a reload of this module.
if not set(STRATEGY_NAMES) & set(StrategyRegistry):
    FSDP2.register_strategies(StrategyRegistry)

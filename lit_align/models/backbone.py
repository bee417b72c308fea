"""A Hugging Face network: loading, hidden states, sharding, saving. Subclasses add the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # transformers 5.23

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.adapters.lora import LoRA
from lit_align.models.adapters.sparse_lora import (
    SparseLowRankAdapter,
    has_sparse_adapter,
    merge_sparse_update,
)
from lit_align.models.adapters.switching import AdapterSwitching
from lit_align.models.hidden_states import all_hidden_states, select_hidden_states
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.kernels.rms_norm import replace_rms_norms
from lit_align.models.kernels.varlen_attention import enable_packing
from lit_align.models.parallel.sharding import ShardingConfig, ShardState, gather_weights, shard
from lit_align.models.sltrain import SLTrain, densify_state_dict
from lit_align.models.weights.loading import (
    build_network,
    check_adapter_task,
    load_network,
    resolve_dtype,
    silence_transformers,
    without_dropout,
)
from lit_align.models.weights.quantization import Quantization
from lit_align.models.weights.sharded_loading import cpu_placeholders, load_shards

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Backbone(nn.Module):
    """A network from the hub, from a folder or with random weights. Dropout is set to 0.

    Use the weights only inside `forward`: FSDP2 gathers them there. A network that is built in a
    `torch.device("meta")` context reads its weights when it is sharded. Buffers and new weights
    (heads, adapters) get their values at once.

    Args:
        path: Hub id or folder of the weights. An adapter's folder is merged into its base.
        config: Architecture of random weights (`model_type` and its fields), if path is null.
        lora: Low-rank adapter. Default: none, so that all weights train.
        dtype: Data type of the weights. Default: set by `trainer.precision`.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: transformers' choice.
        activation_checkpointing: Keep only the blocks' inputs and recompute the rest in backward.
        revision: Branch, tag or commit on the hub. Default: the main branch.
        trust_remote_code: Run code from the folder of the weights.
        sltrain: Low-rank plus sparse weights in the blocks. Requires config instead of path.
        quantization: Store the blocks' frozen weights in 8 or 4 bits. Requires adapters.
        compile: Compile the blocks, for a GPU. The first steps take about a minute longer.
    """

    auto_class: ClassVar[type[_BaseAutoModelClass]]  # transformers' class with the same head
    head_name: ClassVar[str]  # language or score, for the role table
    new_weights: ClassVar[tuple[str, ...]] = ()  # weights that `path` may lack
    config_overrides: ClassVar[dict[str, Any]] = {}  # configuration values that the head needs
    always_adapted: ClassVar[bool] = False  # True if there are adapters without `lora`, too

    missing_weights: tuple[str, ...] | list[str] = ()  # not in `path`, initialized randomly
    network: PreTrainedModel
    adapted: PeftModel | None  # peft's wrapper of `network`, with the same weights
    task_type: str  # peft's name of the task
    shard_state: ShardState  # set when the network is loaded, and by `shard`

    def __init__(
        self,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        sltrain: SLTrain | None = None,
        quantization: Quantization | None = None,
        compile: bool = False,
    ):
        super().__init__()
        self.check_arguments(path, config, lora, sltrain, quantization)
        self.path, self.sltrain = path, sltrain
        self.name = path or f"{(config or {}).get('model_type')} from random weights"
        self.load_options: dict[str, Any] = {
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self.shard_state = ShardState()
        self.is_compiled = compile
        is_meta = torch.get_default_device().type == "meta"
        # quantization needs unsharded weights, so it reads them at once
        self.defers_loading = is_meta and quantization is None
        with torch.device("cpu"):
            self.build(config, lora, dtype, activation_checkpointing, quantization)
            if sltrain is not None:
                sltrain.replace_linears(self.blocks)
        if compile:
            compile_blocks(self.blocks, activation_checkpointing)

    def build(
        self,
        config: dict[str, Any] | None,
        lora: LoRA | None,
        dtype: str | None,
        activation_checkpointing: bool,
        quantization: Quantization | None,
    ) -> None:
        """Load the network and add its adapters. The arguments are the constructor's."""
        self.network, self.missing_weights = self.load_or_init(config, resolve_dtype(dtype))
        replace_rms_norms(self.network)
        self.uses_packing = enable_packing(self.network)
        # transformers recomputes blocks in training mode only; dropout is 0 in either mode
        self.network.train()
        if activation_checkpointing:
            # before adapters are added, as peft then lets the blocks' inputs require gradients
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        if quantization is not None:
            quantization.replace_linears(self.blocks)
        with cpu_placeholders(self.network):
            adapted = self.add_adapters(lora)
        self.register_module("adapted", adapted)  # also None: a frozen adapter may be loaded later
        self.trained_adapters = list(adapted.peft_config) if adapted is not None else []

    def check_arguments(
        self,
        path: str | None,
        config: dict[str, Any] | None,
        lora: LoRA | None,
        sltrain: SLTrain | None,
        quantization: Quantization | None,
    ) -> None:
        """Raise a `UserError` for arguments of the constructor that cannot be combined."""
        if path is None and config is None:
            raise UserError(f"{type(self).__name__} has neither path nor config. Set one of them.")
        if sltrain is not None:
            sltrain.check_compatible(path)
        if quantization is None:
            return
        if sltrain is not None:
            raise UserError("sltrain and quantization cannot be combined. Remove one of them.")
        if lora is None and not self.always_adapted:
            raise UserError("quantization freezes all weights. Set lora, or remove quantization.")
        if isinstance(lora, SparseLowRankAdapter):  # it saves its update in the base's weights
            raise UserError("SparseLowRankAdapter and quantization cannot be combined. Use LoRA.")

    def load_or_init(
        self, config: dict[str, Any] | None, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, list[str]]:
        """Return the network and the names of weights that its path lacks.

        Args:
            config: Architecture of random weights, used if there is no path.
            dtype: Data type of the weights.
        """
        attn_implementation, revision, trust = self.load_options.values()
        options = {"dtype": dtype, "trust_remote_code": trust}
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        configure = partial(without_dropout, overrides=self.config_overrides)
        if self.path is None:
            return build_network(self.auto_class, self.name, config or {}, configure, options), []
        options["revision"] = revision
        check_adapter_task(self.path, self.task_type)
        network, missing, files = load_network(
            self.auto_class, self.path, configure, self.new_weights, options, self.defers_loading
        )
        self.shard_state = ShardState(weight_files=files)
        return network, missing

    def add_adapters(self, lora: LoRA | None) -> PeftModel | None:
        """Add the adapter to the network and return peft's wrapper; None without `lora`."""
        return lora.apply_to(self.network, self.task_type) if lora else None

    @property
    def adapters(self) -> AdapterSwitching:
        """Return the object that activates, disables and loads adapters."""
        return AdapterSwitching(self)

    def forward(
        self, compute: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """Return the result of `compute`, which runs with unsharded weights.

        FSDP2's hooks gather weights around `forward`, so all computation must run inside it.
        """
        return compute(*args, **kwargs)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks, from first to last."""
        # private: the classes that `device_map` may not split (transformers 5.23)
        names = set(self.network._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    @property
    def vocab_size(self) -> int:
        """Return V, the number of rows of the input embedding."""
        size: int = self.network.get_input_embeddings().weight.shape[0]
        return size

    @property
    def fingerprint(self) -> float:
        """Return a number that identifies the frozen weights, for any sharding."""
        sums = [w.detach().double().sum() for w in self.parameters() if not w.requires_grad]
        return sum(float(s.full_tensor() if isinstance(s, DTensor) else s) for s in sums)

    def verify_weights(self) -> None:
        """Raise a `UserError` for weights that this kind of network does not support."""

    @property
    def stop_ids(self) -> list[int]:
        """Return the stop tokens of the generation configuration. The tokenizer may have more."""
        generation = getattr(self.network, "generation_config", None) or GenerationConfig()
        stops = generation.eos_token_id
        return [stops] if isinstance(stops, int) else list(stops or [])

    def hidden_states(self, batch: Experience | TextBatch) -> Tensor:
        """Return the last hidden states [N, T, H]. Values at padding have no meaning.

        Args:
            batch: N texts of T tokens.
        """
        return all_hidden_states(self.network, batch, self.uses_packing)

    def hidden_states_at(self, batch: Experience | TextBatch, index: Tensor) -> Tensor:
        """Return the last hidden states [n, H] at some tokens.

        Args:
            batch: N texts of T tokens.
            index: [n] positions of the tokens in [N * T].
        """
        return select_hidden_states(self.network, batch, self.uses_packing, index)

    def shard(self, mesh: DeviceMesh, config: ShardingConfig) -> None:
        """Shard the weights over the ranks of a mesh, and read those that are still on meta.

        Args:
            mesh: Lightning's mesh with a tensor-parallel size of 1, or a mesh of replicas x shards.
            config: Settings of the sharding.
        """
        files = self.shard_state.weight_files
        if config.activation_checkpointing:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            if self.is_compiled:
                compile_blocks(self.blocks, uses_checkpointing=True)
        self.shard_state = shard(self, self.blocks, mesh, config)
        if files is not None:
            # without an index this is the current device, as in torch's fully_shard
            device = torch.device("cpu" if config.cpu_offload else mesh.device_type)
            load_shards(self.network, files, device)

    @contextmanager
    def gather_weights(self) -> Iterator[Self]:
        """Gather the weights if they fit in memory, and use eval mode, within the context."""
        with gather_weights(self, self.shard_state.decide_gather(self, self.name)):
            yield self

    @property
    def saves_full_model(self) -> bool:
        """Return True if `save` writes a full model, False if it writes an adapter."""
        return self.adapted is None or has_sparse_adapter(self.network)

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Write a folder that transformers loads, or peft if it is an adapter.

        Args:
            folder: Folder, created if missing.
            is_main_process: True on the rank that writes. All ranks gather, so all must call it.
        """
        adapter = None if self.saves_full_model else self.adapted
        model = adapter or self.network
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if is_main_process:
            weights = merge_sparse_update(model, densify_state_dict(model, state))
            extra = {"selected_adapters": self.trained_adapters} if adapter else {}
            with silence_transformers():
                model.save_pretrained(folder, state_dict=weights, **extra)

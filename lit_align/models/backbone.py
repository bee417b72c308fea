"""A Hugging Face network in our hands: loading, padding, sharding, saving. Heads stand above."""

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
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
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
from lit_align.models.hidden_states import packed_hidden_states, padded_hidden_states
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.kernels.packing import is_trimmed
from lit_align.models.kernels.rms_norm import replace_rms_norms
from lit_align.models.kernels.varlen_attention import enable_packing
from lit_align.models.parallel.sharding import ShardingConfig, ShardState, gather_weights, shard
from lit_align.models.sltrain import SLTrain, densify_state_dict
from lit_align.models.weights.loading import (
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
    """A network from the hub, from a folder, or from random weights; dropout is switched off.

    Whatever uses the weights runs inside `forward`, so that sharded weights are whole there.
    Built inside a `torch.device("meta")` context, a network reads its weights from their files when
    it is sharded. Buffers and new weights (heads, adapters) always get their values at once.

    Args:
        path: Hub id or folder of the weights; an adapter's folder is merged into its base.
        config: Architecture (`model_type` and its fields) to train from random weights where no
            path is given.
        lora: Low-rank adapter; without one all weights train.
        dtype: Data type of the weights; by default what `trainer.precision` says.
        attn_implementation: sdpa, eager, flash_attention_2, ...; by default
            the best that transformers has for the architecture.
        activation_checkpointing: Keep only the blocks' inputs and recompute the rest in backward.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the weights.
        sltrain: Trains the blocks' weights as low-rank plus sparse ones; with a config alone.
        quantization: Codes the frozen weights of the blocks in 8 or 4 bits; with adapters alone.
        compile: Compile the blocks: for a GPU, whose first steps then take a minute longer.
    """

    auto_class: ClassVar[type[_BaseAutoModelClass]]  # transformers' class with the wanted head
    head_name: ClassVar[str]  # the head's name for people: language or score
    new_weights: ClassVar[tuple[str, ...]] = ()  # what a checkpoint may lack
    config_overrides: ClassVar[dict[str, Any]] = {}  # what the head asks of the configuration
    always_adapted: ClassVar[bool] = False  # whether it has adapters also where no `lora` is given

    missing_weights: tuple[str, ...] | list[str] = ()  # not in the path: random
    network: PreTrainedModel
    adapted: PeftModel | None  # peft's view of the network
    task_type: str  # peft's name of the task_type
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
        self.defers_loading = is_meta and quantization is None  # codes are made of whole weights
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
        """Load the network and adapt it; the arguments are the constructor's."""
        self.network, self.missing_weights = self.load_or_init(config, resolve_dtype(dtype))
        replace_rms_norms(self.network)
        self.uses_packing = enable_packing(self.network)  # reads texts one behind the other
        self.network.train()  # blocks are recomputed in this mode alone; dropout is off anyway
        if (
            activation_checkpointing
        ):  # before the adapters: peft then lets the inputs require gradients
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
        """Refuse arguments of the constructor that cannot be combined."""
        if path is None and config is None:
            raise UserError(f"{type(self).__name__} needs a path, or a config to start from.")
        if sltrain is not None:
            sltrain.check_compatible(path)
        if quantization is None:
            return
        if sltrain is not None:
            raise UserError("SLTrain trains all weights, and quantized ones are frozen: drop one.")
        if lora is None and not self.always_adapted:
            raise UserError(
                "A quantized base is frozen, so there would be nothing to train: add lora, or "
                "leave quantization out."
            )
        if isinstance(lora, SparseLowRankAdapter):
            raise UserError(
                "SparseLowRankAdapter saves its update in whole weights, and a quantized base has "
                "none: take LoRA."
            )

    def load_or_init(
        self, config: dict[str, Any] | None, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, list[str]]:
        """The network, and what its path lacked; random weights where there is no path.

        Args:
            config: As given.
            dtype: Of the weights.
        """
        attn_implementation, revision, trust = self.load_options.values()
        options = {"dtype": dtype, "trust_remote_code": trust}
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        configure = partial(without_dropout, overrides=self.config_overrides)
        if self.path is None:
            settings = configure(AutoConfig.for_model(**(config or {})))
            return self.auto_class.from_config(settings, **options), []
        options["revision"] = revision
        check_adapter_task(self.path, self.task_type)
        network, missing, files = load_network(
            self.auto_class, self.path, configure, self.new_weights, options, self.defers_loading
        )
        self.shard_state = ShardState(weight_files=files)
        return network, missing

    def add_adapters(self, lora: LoRA | None) -> PeftModel | None:
        """Puts the adapter into the network; peft's view of it."""
        return lora.apply_to(self.network, self.task_type) if lora else None

    @property
    def adapters(self) -> AdapterSwitching:
        """The adapters of the network, to activate, disable or load them."""
        return AdapterSwitching(self)

    def forward(
        self, compute: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """`compute` where the weights are whole: the one way into a sharded network."""
        return compute(*args, **kwargs)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, from first to last."""
        # the classes that `device_map` may not split (transformers 5.23)
        names = set(self.network._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    @property
    def vocab_size(self) -> int:
        """V, token ids that the input embedding knows."""
        size: int = self.network.get_input_embeddings().weight.shape[0]
        return size

    @property
    def fingerprint(self) -> float:
        """A number that other frozen weights are very unlikely to have, however they are split."""
        sums = [w.detach().double().sum() for w in self.parameters() if not w.requires_grad]
        return sum(float(s.full_tensor() if isinstance(s, DTensor) else s) for s in sums)

    def verify_weights(self) -> None:
        """Refuses weights that this kind of network could not serve with; all do by default."""

    @property
    def stop_ids(self) -> list[int]:
        """The generation configuration's end tokens; the tokenizer may know more."""
        generation = getattr(self.network, "generation_config", None) or GenerationConfig()
        stops = generation.eos_token_id
        return [stops] if isinstance(stops, int) else list(stops or [])

    def hidden_states(self, batch: Experience | TextBatch) -> Tensor:
        """[N, T, H]: the trunk's last hidden state; at padding, the one of the nearest token.

        Positions count from the first real token of each text.
        """
        if not self.uses_packing or not is_trimmed(batch):
            return padded_hidden_states(self.network, batch)
        row, unpack_index = packed_hidden_states(self.network, batch)
        return row.index_select(0, unpack_index).view(*batch.tokens.shape, -1)

    def hidden_states_at(self, batch: Experience | TextBatch, index: Tensor) -> Tensor:
        """[n, H]: those at [n] places in [N * T]."""
        if not self.uses_packing or not is_trimmed(batch):
            return padded_hidden_states(self.network, batch).flatten(0, 1).index_select(0, index)
        row, unpack_index = packed_hidden_states(self.network, batch)
        return row.index_select(0, unpack_index.index_select(0, index))

    def shard(self, mesh: DeviceMesh, config: ShardingConfig) -> None:
        """Split the weights over the ranks of a mesh, and load those that are still in their files.

        Args:
            mesh: Lightning's mesh with a tensor-parallel size of 1, or a mesh of replicas x shards.
            config: Settings of the split.
        """
        files = self.shard_state.weight_files
        if config.activation_checkpointing:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            if self.is_compiled:
                compile_blocks(self.blocks, uses_checkpointing=True)
        self.shard_state = shard(self, self.blocks, mesh, config)
        if files is not None:
            kind = (
                "cpu" if config.cpu_offload else mesh.device_type
            )  # its current one, as in fully_shard
            load_shards(self.network, files, torch.device(kind))

    @contextmanager
    def gather_weights(self) -> Iterator[Self]:
        """Generate in eval mode, from the unsharded weights if they fit in memory."""
        with gather_weights(self, self.shard_state.decide_gather(self, self.name)):
            yield self

    @property
    def saves_full_model(self) -> bool:
        """Whether its folder holds a whole model, and not an adapter that needs its base."""
        return self.adapted is None or has_sparse_adapter(self.network)

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Writes what transformers (or, for an adapter, peft) loads by itself.

        Args:
            folder: Where; created if it is not there.
            is_main_process: Whether this process writes; all of them gather sharded weights.
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

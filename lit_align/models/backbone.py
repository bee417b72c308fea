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

from lit_align.batches import Experience, Tokens
from lit_align.models.adapters.lora import LoRA
from lit_align.models.adapters.sparse_lora import (
    SparseLowRankAdapter,
    is_merged_when_saved,
    with_update_merged,
)
from lit_align.models.adapters.switching import AdapterSwitching
from lit_align.models.hidden_states import masked_hidden, packed_hidden
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.kernels.packing import is_trimmed
from lit_align.models.kernels.rms_norm import replace_norms
from lit_align.models.kernels.varlen_attention import let_pack
from lit_align.models.parallel.sharding import Sharding, ShardState, gathered, shard
from lit_align.models.sltrain import SLTrain, with_dense_weights
from lit_align.models.weights.loading import (
    check_task,
    data_type,
    load_network,
    quiet_transformers,
    without_dropout,
)
from lit_align.models.weights.quantization import Quantisation
from lit_align.models.weights.sharded_loading import fill, light

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
        attention: Attention implementation (sdpa, eager, flash_attention_2, ...); by default
            the best that transformers has for the architecture.
        checkpointing: Keep only the blocks' inputs and compute the rest again in backward.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the weights.
        sltrain: Trains the blocks' weights as low-rank plus sparse ones; with a config alone.
        quantisation: Codes the frozen weights of the blocks in 8 or 4 bits; with adapters alone.
        compile: Compile the blocks: for a GPU, whose first steps then take a minute longer.
    """

    auto: ClassVar[type[_BaseAutoModelClass]]  # transformers' class with the wanted head
    reads: ClassVar[str]  # the head's name for people: language or score
    new_weights: ClassVar[tuple[str, ...]] = ()  # what a checkpoint may lack
    overrides: ClassVar[dict[str, Any]] = {}  # what the head asks of the configuration
    adapts: ClassVar[bool] = False  # whether it has adapters also where no `lora` is given

    missing: tuple[str, ...] | list[str] = ()  # weights that the path lacked; they are random
    network: PreTrainedModel
    adapted: PeftModel | None  # peft's view of the network
    task: str  # peft's name of the task
    shard_state: ShardState  # set when the network is loaded, and by `shard`

    def __init__(
        self,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        sltrain: SLTrain | None = None,
        quantisation: Quantisation | None = None,
        compile: bool = False,
    ):
        super().__init__()
        self.refuse(path, config, lora, sltrain, quantisation)
        self.path, self.sltrain = path, sltrain
        self.name = path or f"{(config or {}).get('model_type')} from random weights"
        self.reading: dict[str, Any] = {
            "attention": attention,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self.shard_state = ShardState()
        self.compiles = compile
        is_meta = torch.get_default_device().type == "meta"
        self.defers_loading = is_meta and quantisation is None  # codes are made of whole weights
        with torch.device("cpu"):
            self.build(config, lora, dtype, checkpointing, quantisation)
            if sltrain is not None:
                sltrain.replace(self.blocks)
        if compile:
            compile_blocks(self.blocks, checkpointing)

    def build(
        self,
        config: dict[str, Any] | None,
        lora: LoRA | None,
        dtype: str | None,
        checkpointing: bool,
        quantisation: Quantisation | None,
    ) -> None:
        """Load the network and adapt it; the arguments are the constructor's."""
        self.network, self.missing = self.load(config, data_type(dtype))
        replace_norms(self.network)
        self.packs = let_pack(self.network)  # reads texts one behind the other
        self.network.train()  # blocks are recomputed in this mode alone; dropout is off anyway
        if checkpointing:  # before the adapters: peft then lets the inputs require gradients
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        if quantisation is not None:
            quantisation.replace(self.blocks)
        with light(self.network):
            adapted = self.adapt(lora)
        self.register_module("adapted", adapted)  # also None: a frozen adapter may be loaded later
        self.trained_adapters = list(adapted.peft_config) if adapted is not None else []

    def refuse(
        self,
        path: str | None,
        config: dict[str, Any] | None,
        lora: LoRA | None,
        sltrain: SLTrain | None,
        quantisation: Quantisation | None,
    ) -> None:
        """Refuse arguments of the constructor that cannot be combined."""
        if path is None and config is None:
            raise ValueError(f"{type(self).__name__} needs a path, or a config to start from.")
        if sltrain is not None:
            sltrain.refuse(path)
        if quantisation is None:
            return
        if sltrain is not None:
            raise ValueError("SLTrain trains all weights, and quantised ones are frozen: drop one.")
        if lora is None and not self.adapts:
            raise ValueError(
                "A quantised base is frozen, so there would be nothing to train: add lora, or "
                "leave quantisation out."
            )
        if isinstance(lora, SparseLowRankAdapter):
            raise ValueError(
                "SparseLowRankAdapter saves its update in whole weights, and a quantised base has "
                "none: take LoRA."
            )

    def load(
        self, config: dict[str, Any] | None, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, list[str]]:
        """The network, and what its path lacked; random weights where there is no path.

        Args:
            config: As given.
            dtype: Of the weights.
        """
        attention, revision, trust = self.reading.values()
        options = {"dtype": dtype, "trust_remote_code": trust}
        if attention:
            options["attn_implementation"] = attention
        configure = partial(without_dropout, overrides=self.overrides)
        if self.path is None:
            settings = configure(AutoConfig.for_model(**(config or {})))
            return self.auto.from_config(settings, **options), []
        options["revision"] = revision
        check_task(self.path, self.task)
        network, missing, files = load_network(
            self.auto, self.path, configure, self.new_weights, options, self.defers_loading
        )
        self.shard_state = ShardState(weight_files=files)
        return network, missing

    def adapt(self, lora: LoRA | None) -> PeftModel | None:
        """Puts the adapter into the network; peft's view of it."""
        return lora.adapt(self.network, self.task) if lora else None

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
    def vocabulary(self) -> int:
        """V, token ids that the input embedding knows."""
        size: int = self.network.get_input_embeddings().weight.shape[0]
        return size

    @property
    def fingerprint(self) -> float:
        """A number that other frozen weights are very unlikely to have, however they are split."""
        sums = [w.detach().double().sum() for w in self.parameters() if not w.requires_grad]
        return sum(float(s.full_tensor() if isinstance(s, DTensor) else s) for s in sums)

    def verify(self) -> None:
        """Refuses weights that this kind of network could not serve with; all do by default."""

    @property
    def stop_ids(self) -> list[int]:
        """The generation configuration's end tokens; the tokenizer may know more."""
        generation = getattr(self.network, "generation_config", None) or GenerationConfig()
        stops = generation.eos_token_id
        return [stops] if isinstance(stops, int) else list(stops or [])

    def hidden(self, batch: Experience | Tokens) -> Tensor:
        """[N, T, H]: the trunk's last hidden state; at padding, the one of the nearest token.

        Positions count from the first real token of each text.
        """
        if not self.packs or not is_trimmed(batch):
            return masked_hidden(self.network, batch)
        row, back = packed_hidden(self.network, batch)
        return row.index_select(0, back).view(*batch.tokens.shape, -1)

    def hidden_at(self, batch: Experience | Tokens, places: Tensor) -> Tensor:
        """[n, H]: those at [n] places in [N * T]."""
        if not self.packs or not is_trimmed(batch):
            return masked_hidden(self.network, batch).flatten(0, 1).index_select(0, places)
        row, back = packed_hidden(self.network, batch)
        return row.index_select(0, back.index_select(0, places))

    def shard(self, mesh: DeviceMesh, how: Sharding) -> None:
        """Split the weights over the ranks of a mesh, and load those that are still in their files.

        Args:
            mesh: Lightning's mesh with a tensor-parallel size of 1, or a mesh of replicas x shards.
            how: Settings of the split.
        """
        files = self.shard_state.weight_files
        if how.checkpointing:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            if self.compiles:
                compile_blocks(self.blocks, recomputed=True)
        self.shard_state = shard(self, self.blocks, mesh, how)
        if files is not None:
            kind = "cpu" if how.offload else mesh.device_type  # its current one, as in fully_shard
            fill(self.network, files, torch.device(kind))

    @contextmanager
    def gathered(self) -> Iterator[Self]:
        """Generate in eval mode, from the unsharded weights if they fit in memory."""
        with gathered(self, self.shard_state.decide_gather(self, self.name)):
            yield self

    @property
    def saved_whole(self) -> bool:
        """Whether its folder holds a whole model, and not an adapter that needs its base."""
        return self.adapted is None or is_merged_when_saved(self.network)

    def save(self, folder: Path, main: bool = True) -> None:
        """Writes what transformers (or, for an adapter, peft) loads by itself.

        Args:
            folder: Where; created if it is not there.
            main: Whether this process writes; sharded weights are gathered on all of them.
        """
        adapter = None if self.saved_whole else self.adapted
        model = adapter or self.network
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if main:
            weights = with_update_merged(model, with_dense_weights(model, state))
            own = {"selected_adapters": self.trained_adapters} if adapter else {}
            with quiet_transformers():
                model.save_pretrained(folder, state_dict=weights, **own)

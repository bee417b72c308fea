"""Sharded loading: each rank reads only its own rows of the weights from the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # transformers 5.23
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

READ_CHUNK_SIZE = 4 * 2**20  # numbers per read
# Private argument of `cached_file`: return None for a missing file (transformers 5.23).
NONE_IF_MISSING = {"_raise_exceptions_for_missing_entries": False}
# parts of names that peft inserts (peft 0.21)
PEFT_NAME_PARTS = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")


class WeightFiles:
    """Index of the tensors in safetensors files: the file and the shape of each name.

    Args:
        files: Paths of the files.
    """

    def __init__(self, files: list[str]):
        self.file_of: dict[str, str] = {}  # path of the file by tensor name
        self.shapes: dict[str, list[int]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.file_of[name] = path
                    self.shapes[name] = file.get_slice(name).get_shape()

    @classmethod
    def find(cls, source: str, revision: str | None) -> WeightFiles | None:
        """Return the files of a folder or hub id; None if it has no safetensors.

        Args:
            source: Folder or hub id.
            revision: Branch, tag or commit on the hub. None: the main branch.
        """
        options = {"revision": revision, **NONE_IF_MISSING}
        single = cached_file(source, SAFE_WEIGHTS_NAME, **options)
        if single is not None:
            return cls([single])
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
        if index is None:
            return None
        with open(index) as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        found = [cached_file(source, name, **options) for name in names]
        return cls([path for path in found if path is not None])

    def file_key(self, name: str, prefix: str) -> str | None:
        """Return the name in the files of a network's weight; None if they lack it.

        Args:
            name: Name in the network, which may have adapters.
            prefix: Prefix of the backbone's weights. Some files have names without it.
        """
        plain = PEFT_NAME_PARTS.sub("", name)
        names = (plain, plain.removeprefix(f"{prefix}."), f"{prefix}.{plain}")
        return next((name for name in names if name in self.file_of), None)

    def read_rows(self, key: str, start: int, into: Tensor) -> None:
        """Copy rows of a tensor in the files into another tensor.

        A slice of safetensors is a copy in memory, so a few rows are read at a time. Closing the
        file frees its pages.

        Args:
            key: Name of a tensor [out, ..] in the files.
            start: First row to read.
            into: [rows, ..] of any dtype, on any device.
        """
        # safetensors creates tensors on torch's default device, which may be meta (safetensors 0.8)
        with torch.device("cpu"), safe_open(self.file_of[key], framework="pt") as file:
            if not into.ndim:
                into.copy_(file.get_tensor(key))
                return
            stored = file.get_slice(key)
            num_rows = max(READ_CHUNK_SIZE * len(into) // max(into.numel(), 1), 1)
            for row in range(0, len(into), num_rows):
                stop = min(row + num_rows, len(into))
                into[row:stop].copy_(stored[start + row : start + stop])


def build_on_meta(
    auto_class: type[_BaseAutoModelClass],
    source: str,
    settings: PretrainedConfig,
    new_weights: tuple[str, ...],
    options: dict[str, Any],
) -> tuple[PreTrainedModel, list[str], WeightFiles] | None:
    """Build a network on the meta device, with values only in buffers and new weights.

    Args:
        auto_class: transformers' class with the head.
        source: Folder or hub id.
        settings: Configuration of the network.
        new_weights: Names of weights that the files may lack.
        options: Arguments of `from_config`, and the revision.

    Returns:
        The network, its new weights' names and the files of the others. None if the files have
        other names or shapes, which transformers may convert.
    """
    options = dict(options)
    revision = options.pop("revision")
    if (files := WeightFiles.find(source, revision)) is None:
        return None
    with init_empty_weights(include_buffers=False):  # rotary frequencies are not in the files
        network: PreTrainedModel = auto_class.from_config(settings, **options)
    # Creating the network on meta unties the weights, so tie them again.
    network.tie_weights()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    keys = {name: files.file_key(name, network.base_model_prefix) for name in tensors}
    missing = sorted(name for name, _ in network.named_parameters() if keys[name] is None)
    known = [(key, tensors[name]) for name, key in keys.items() if key is not None]
    shapes_match = all(files.shapes[key] == list(tensor.shape) for key, tensor in known)
    if not shapes_match or set(missing) - set(new_weights):
        return None
    for name in missing:
        initialize_weight(network, name)
    for key, tensor in known:
        if not tensor.is_meta:  # only buffers have memory
            files.read_rows(key, 0, tensor)
    network.generation_config = load_generation_config(source, revision, network)
    return network, missing, files


def initialize_weight(network: PreTrainedModel, name: str) -> None:
    """Replace a meta weight by one on the CPU with transformers' initial values.

    Args:
        network: Network on the meta device.
        name: Name of the weight.
    """
    owner, _, leaf = name.rpartition(".")
    module, meta = network.get_submodule(owner), network.get_parameter(name)
    module.register_parameter(leaf, nn.Parameter(torch.empty_like(meta, device="cpu")))
    network._init_weights(module)  # private, transformers 5.23


def load_generation_config(
    source: str, revision: str | None, network: PreTrainedModel
) -> GenerationConfig | None:
    """Return the generation configuration of a folder, by default derived from its config.json.

    Args:
        source: Folder or hub id.
        revision: Branch, tag or commit on the hub. None: the main branch.
        network: Network of the source. If it cannot generate, the result is None.
    """
    if not network.can_generate():
        return None
    name = "generation_config.json"
    options = {"revision": revision, **NONE_IF_MISSING}
    if cached_file(source, name, **options) is None:
        return GenerationConfig.from_model_config(network.config)
    return GenerationConfig.from_pretrained(source, **({"revision": revision} if revision else {}))


@contextmanager
def cpu_placeholders(network: nn.Module) -> Iterator[None]:
    """Replace weights on the meta device by CPU tensors of stride 0 while the context is open.

    peft creates an adapter on the device of its base, and an adapter on meta would have no values.
    New tensors are created on the CPU, also inside a `torch.device("meta")` context.

    Args:
        network: Network that may have weights on the meta device.

    Example:
        >>> layer = nn.Linear(2, 3, device="meta")
        >>> with cpu_placeholders(layer):
        ...     layer.weight.device.type, layer.weight.stride()
        ('cpu', (0, 0))
        >>> layer.weight.device.type
        'meta'
    """
    meta_weights = [
        (module, name, weight)
        for module in network.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if weight.is_meta
    ]
    placeholders = {
        weight: nn.Parameter(weight.new_zeros(1, device="cpu").expand(weight.shape))
        for _, _, weight in meta_weights
    }
    for module, name, weight in meta_weights:
        placeholders[weight].requires_grad_(weight.requires_grad)
        module.register_parameter(name, placeholders[weight])
    try:
        with torch.device("cpu"):
            yield
    finally:
        for module, name, weight in meta_weights:
            weight.requires_grad_(placeholders[weight].requires_grad)
            module.register_parameter(name, weight)


@torch.no_grad()
def load_shards(network: PreTrainedModel, files: WeightFiles, device: torch.device) -> None:
    """Read this rank's rows of all weights from the files, one tensor after the other.

    Args:
        network: Sharded network. Its meta weights are replaced.
        files: Files of the weights.
        device: Device of the new shards.
    """
    prefix = network.base_model_prefix
    loaded: dict[Tensor, nn.Parameter] = {}  # a tied weight has two names and is read once
    for path, module in network.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            key = files.file_key(f"{path}.{name}".lstrip("."), prefix)
            if isinstance(weight, DTensor) and key is not None and weight not in loaded:
                if weight.to_local().is_meta:
                    loaded[weight] = load_shard(weight, key, files, device)
                else:  # a copy made by peft's `modules_to_save`; it has placeholder values
                    files.read_rows(key, first_local_row(weight), weight.to_local())
            if weight in loaded:
                module.register_parameter(name, loaded[weight])


def load_shard(weight: DTensor, key: str, files: WeightFiles, device: torch.device) -> nn.Parameter:
    """Return a sharded weight with this rank's rows from the files.

    Args:
        weight: [out, ..] on the meta device, sharded by rows.
        key: Name in the files.
        files: Files of the weights.
        device: Device of the result.
    """
    local = torch.empty_like(weight.to_local(), device=device)
    files.read_rows(key, first_local_row(weight), local)
    weight_shards = DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return nn.Parameter(weight_shards, requires_grad=weight.requires_grad)


def first_local_row(weight: DTensor) -> int:
    """Return the index of this rank's first row of a sharded weight.

    With FSDP2 every rank holds ceil(rows / ranks) rows; the last ranks hold fewer.

    Args:
        weight: [out, ..] sharded by rows, or replicated.
    """
    for number, placement in enumerate(weight.placements):
        if placement.is_shard():
            size = -(-len(weight) // weight.device_mesh.size(number))
            return size * weight.device_mesh.get_local_rank(number)
    return 0

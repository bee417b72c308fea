"""Host memory of a rank while it loads: its shards, and one tensor at a time."""

import gc
from pathlib import Path

import pytest
from tiny_models import RandomTexts, tiny, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.algorithms.sft import SFT
from lit_align.models.adapters.lora import LoRA
from lit_align.models.policy import Policy

GIB = 2**30
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def process_memory(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """Folder of a model of 1.1 GiB in float32, in files of 300 MB with an index."""
    place = tmp_path_factory.mktemp("big")
    network = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert network.num_parameters() * 4 > GIB
    network.save_pretrained(place, max_shard_size="300MB")
    assert (place / "model.safetensors.index.json").is_file()
    del network
    gc.collect()
    return str(place)


class LoadedError(Exception):
    """Raised where training would start."""


def load(folder, path, lora):
    """Return the loaded algorithm, and the peak bytes of the process until then."""
    algorithm, peaks = SFT(policy=lambda: Policy(path, lora=LoRA(r=8) if lora else None)), []

    def stop() -> None:
        peaks.append(process_memory("VmHWM"))
        raise LoadedError

    algorithm.on_fit_start = stop
    run = trainer(folder, devices=2, strategy="fsdp2")
    run.callbacks.clear()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = process_memory("VmRSS")
    with pytest.raises(LoadedError):
        run.fit(algorithm, RandomTexts(1))
    return algorithm, peaks[0] - before


def load_bytes(folder, path, lora):
    """Return bytes: peak of loading, shards, the largest tensor, and all weights."""
    load(folder, str(folder / "tiny"), lora)  # runs the late imports
    algorithm, taken = load(folder, path, lora)
    weights = list(algorithm.parameters())
    held = sum(weight.to_local().numel() * weight.element_size() for weight in weights)
    largest = max(weight.numel() * weight.element_size() for weight in weights)
    return taken, held, largest, sum(weight.numel() for weight in weights) * 4


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_loading_takes_little_more_than_the_shards(new_ranks, tmp_path, path, lora):
    tiny().save(tmp_path / "tiny")
    for taken, held, largest, total in new_ranks(load_bytes, tmp_path, path, lora):
        assert held == pytest.approx(total / 2, rel=0.01)
        assert taken < 1.3 * held + largest

"""What a rank needs in host memory until training starts: its shards, and one tensor at a time."""

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


def kib(name: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A model of 1.1 GiB in float32, in files of 300 MB and an index."""
    place = tmp_path_factory.mktemp("big")
    network = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert network.num_parameters() * 4 > GIB
    network.save_pretrained(place, max_shard_size="300MB")
    assert (place / "model.safetensors.index.json").is_file()
    del network
    gc.collect()
    return str(place)


class LoadedError(Exception):
    """Training would start now."""


def load(folder, path, lora):
    """The algorithm as training would begin with it, and the most bytes that it took until then."""
    algorithm, most = SFT(policy=lambda: Policy(path, lora=LoRA(r=8) if lora else None)), []

    def stop() -> None:
        most.append(kib("VmHWM"))
        raise LoadedError

    algorithm.on_fit_start = stop
    run = trainer(folder, devices=2, strategy="fsdp2")
    run.callbacks.clear()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most so far, starts anew
    before = kib("VmRSS")
    with pytest.raises(LoadedError):
        run.fit(algorithm, RandomTexts(1))
    return algorithm, most[0] - before


def loading(folder, path, lora):
    """Bytes that loading took at most, those of shards, of the largest tensor and of all."""
    load(folder, str(folder / "tiny"), lora)  # imports what is imported late
    algorithm, taken = load(folder, path, lora)
    weights = list(algorithm.parameters())
    held = sum(weight.to_local().numel() * weight.element_size() for weight in weights)
    largest = max(weight.numel() * weight.element_size() for weight in weights)
    return taken, held, largest, sum(weight.numel() for weight in weights) * 4


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_a_rank_loads_in_little_more_than_its_shards(new_ranks, tmp_path, path, lora):
    tiny().save(tmp_path / "tiny")
    for taken, held, largest, whole in new_ranks(loading, tmp_path, path, lora):
        assert held == pytest.approx(whole / 2, rel=0.01)
        assert taken < 1.3 * held + largest

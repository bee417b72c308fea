"""How near decoding and the update come to what the device can do, measured on the same device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import MODELS, Case
from bench.data import PAD
from lit_align.batches import Experience, TextBatch
from lit_align.models.generation.decode import SamplingParams
from lit_align.models.policy import Policy

BATCH, PROMPT, RESPONSE = 64, 128, 256
ROUNDS = 2


class Limits(NamedTuple):
    """What a device can do.

    Args:
        rate: Floating point operations per second of large square products.
        bandwidth: Bytes per second that a copy reads and writes.
    """

    rate: float
    bandwidth: float


def seconds(works: list[Callable[[], object]], device: str) -> list[float]:
    """Medians of several works that take turns; the first round, which warms up, is left out."""
    spent: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS + 1):
        for work, times in zip(works, spent, strict=True):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
    return [median(times) for times in spent]


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    if device != "cpu":
        torch.accelerator.synchronize()


def limits(device: str, dtype: torch.dtype) -> Limits:
    """Measure the rate of dense products in `dtype` and the bandwidth of memory."""
    size = 8192 if device != "cpu" else 1024
    one = torch.randn(size, size, device=device, dtype=dtype)
    block = torch.empty(size * size * 4, device=device, dtype=torch.uint8)
    copy = torch.empty_like(block)
    product, move = seconds([lambda: one @ one, lambda: copy.copy_(block)], device)
    return Limits(2 * size**3 / product, 2 * block.nbytes / move)


def policy(case: Case, **settings: bool) -> Policy:
    """Return a random network of the case's size."""
    size = {"num_attention_heads": 4, **MODELS[case.model]}
    config = {"model_type": "llama", "max_position_embeddings": 2048, **size}
    torch.manual_seed(0)
    with torch.device(case.device):
        return Policy(config=config, dtype="bfloat16" if case.is_bf16 else None, **settings)


def prompts(case: Case, number: int) -> Experience:
    """Return prompts of the maximum length."""
    ids = torch.randint(3, MODELS[case.model]["vocab_size"], (number, PROMPT))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Experience(prompts=ids, prompt_mask=mask, prompt_lengths=[PROMPT] * number)
    return batch.to(torch.device(case.device))


def respond(network: Policy, batch: Experience, greedy: int) -> None:
    """Generate responses of the maximum length, the last `greedy` rows greedily."""
    noise = torch.rand(len(batch), RESPONSE, device=batch.prompts.device)
    choices = [row >= len(batch) - greedy for row in range(len(batch))]
    network.generate(batch, noise, choices, [], PAD, SamplingParams())


def update(network: Policy, batch: TextBatch) -> None:
    """Run a forward and a backward pass."""
    loss: Tensor = -network.logprobs(batch).mean()
    loss.backward()
    network.zero_grad()


def texts(case: Case) -> TextBatch:
    """Return texts of 1,024 tokens. On a CPU they are fewer and shorter."""
    shape = (16, 1024) if case.is_bf16 else (2, PROMPT + RESPONSE)
    ids = torch.randint(3, MODELS[case.model]["vocab_size"], shape)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TextBatch(tokens=ids, token_mask=mask, target_mask=mask, lengths=[shape[1]] * shape[0])
    return batch.to(torch.device(case.device))


def min_bytes(network: Policy) -> int:
    """Return the least bytes that BATCH responses read: weights, keys and values per token."""
    config, weight = network.network.config, network.head.weight
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = 2 * config.num_hidden_layers * heads * config.head_dim * BATCH * (PROMPT + RESPONSE / 2)
    return round(RESPONSE * (num_matmul_weights(network) + cache) * weight.element_size())


def num_matmul_weights(network: Policy) -> int:
    """Return the number of weights in matrix products: all but the input embedding."""
    weights = sum(weight.numel() for weight in network.parameters())
    return weights - network.network.get_input_embeddings().weight.numel()


def num_operations(network: Policy, batch: TextBatch) -> int:
    """Return the floating point operations of a forward and a backward pass over full texts."""
    config, tokens = network.network.config, batch.tokens.numel()
    width = config.num_attention_heads * config.head_dim
    # half of the attention's, because it is causal
    attention = 6 * config.num_hidden_layers * width * tokens * batch.tokens.shape[1]
    return 6 * num_matmul_weights(network) * tokens + attention


def report(case: Case) -> None:
    """Print the percentages of the limits for one size, for each way to decode and to update."""
    limit = limits(case.device, torch.bfloat16 if case.is_bf16 else torch.float32)
    print(
        f"{case.model}: {limit.rate / 1e12:.3f} Tflop/s, {limit.bandwidth / 1e9:.0f} GB/s",
        flush=True,
    )
    prompt_batch, text_batch = prompts(case, BATCH), texts(case)
    both = prompt_batch.repeat_interleave(2)
    ways = {"plain": {"static_kv_cache": False}, "recorded": {"static_kv_cache": True}}
    ways["compiled"] = {"static_kv_cache": True, "compile": True}
    for name, settings in ways.items():
        network = policy(case, **settings)
        works = [
            partial(respond, network, prompt_batch, 0),
            partial(respond, network, both, BATCH),
            partial(update, network, text_batch),
        ]
        decode, greedy, updated = seconds(works, case.device)
        print(
            f"{case.model} {name:<9} {BATCH} rows {decode / RESPONSE * 1e3:.2f} ms a token, "
            f"{min_bytes(network) / limit.bandwidth / decode:.0%} of the bandwidth; as many greedy "
            f"rows more {greedy / decode - 1:.0%} more time; update {updated * 1e3:.0f} ms, "
            f"{num_operations(network, text_batch) / limit.rate / updated:.0%} of the rate",
            flush=True,
        )

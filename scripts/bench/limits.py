"""How near decoding and the update come to what the device can do, measured on the same device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import MODELS, Case
from bench.material import PAD
from lit_align.batches import Experience, Tokens
from lit_align.models.decoding import Sampling
from lit_align.models.policy import Policy

BATCH, PROMPT, ANSWER = 64, 128, 64
ROUNDS = 5


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
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            if turn:
                times.append(time.perf_counter() - start)
    return [median(times) for times in spent]


def synchronise(device: str) -> None:
    """Waits until the device has done all that it was told."""
    if device != "cpu":
        torch.accelerator.synchronize()


def limits(device: str, dtype: torch.dtype) -> Limits:
    """Of dense products in `dtype`, and of memory."""
    size = 8192 if device != "cpu" else 1024
    one = torch.randn(size, size, device=device, dtype=dtype)
    block = torch.empty(size * size * 4, device=device, dtype=torch.uint8)
    copy = torch.empty_like(block)
    product, move = seconds([lambda: one @ one, lambda: copy.copy_(block)], device)
    return Limits(2 * size**3 / product, 2 * block.nbytes / move)


def policy(case: Case, fixed_cache: bool = False) -> Policy:
    """A random network of the case's size."""
    size = {"num_attention_heads": 4, **MODELS[case.model]}
    config = {"model_type": "llama", "max_position_embeddings": 2048, **size}
    built = Policy(config=config, dtype="bfloat16" if case.bf16 else None, fixed_cache=fixed_cache)
    return built.to(case.device)


def prompts(case: Case, number: int) -> Experience:
    """Prompts of full length."""
    ids = torch.randint(3, MODELS[case.model]["vocab_size"], (number, PROMPT))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Experience(prompts=ids, prompt_mask=mask, prompt_lengths=[PROMPT] * number)
    return batch.to(torch.device(case.device))


def respond(network: Policy, batch: Experience, greedy: int) -> None:
    """Answers of full length, the last rows of the batch greedily."""
    noise = torch.rand(len(batch), ANSWER, device=batch.prompts.device)
    choices = [row >= len(batch) - greedy for row in range(len(batch))]
    network.respond(batch, noise, choices, [], PAD, Sampling())


def update(network: Policy, batch: Tokens) -> None:
    """A forward and a backward pass."""
    loss: Tensor = -network.logprobs(batch).mean()
    loss.backward()
    network.zero_grad()


def texts(case: Case) -> Tokens:
    """Texts of 640 tokens; fewer of them on a CPU."""
    shape = (16 if case.bf16 else 2, PROMPT + 8 * ANSWER)
    ids = torch.randint(3, MODELS[case.model]["vocab_size"], shape)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Tokens(tokens=ids, token_mask=mask, loss_mask=mask, lengths=[shape[1]] * shape[0])
    return batch.to(torch.device(case.device))


def report(case: Case) -> None:
    """Prints shares of the limits for one size."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    most = limits(case.device, dtype)
    plain, fixed, alone = policy(case), policy(case, fixed_cache=True), prompts(case, BATCH)
    both, learnt = alone.repeat(2), texts(case)
    answered, replayed, greedy, passed = seconds(
        [
            lambda: respond(plain, alone, 0),
            lambda: respond(fixed, alone, 0),
            lambda: respond(plain, both, BATCH),
            lambda: update(plain, learnt),
        ],
        case.device,
    )
    size, head = plain.network.config, plain.network.config.vocab_size
    weights = sum(weight.numel() for weight in plain.parameters()) - head * size.hidden_size
    cache = 2 * size.num_hidden_layers * size.hidden_size * BATCH * (PROMPT + ANSWER / 2)
    moved = ANSWER * (weights + cache) * dtype.itemsize
    tokens = learnt.tokens.numel()
    attention = 6 * size.num_hidden_layers * size.hidden_size * tokens * learnt.tokens.shape[1]
    print(
        f"{case.model}: {most.rate / 1e12:.3f} Tflop/s, {most.bandwidth / 1e9:.0f} GB/s at most; "
        f"decoding {BATCH} rows {moved / most.bandwidth / answered:.0%} of the bandwidth, "
        f"{moved / most.bandwidth / replayed:.0%} from a fixed cache; as many greedy rows more "
        f"{greedy / answered - 1:.0%} more time; update "
        f"{(6 * weights * tokens + attention) / most.rate / passed:.0%} of the rate",
        flush=True,
    )

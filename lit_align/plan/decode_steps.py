"""A rollout's first and last passes, with the cache that all between them would have left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_align.batches import Experience
from lit_align.models.generation.decode import Answers, Context, Responses, Sampling
from lit_align.models.generation.prefill import Begun, Prompts, read
from lit_align.models.generation.static_cache import FixedContext

LAST = 2  # tokens that are decoded; each is the largest so far


def last_tokens(
    context: Context,
    prompts: Experience,
    noise: Tensor,
    greedy: Tensor,
    stops: Tensor,
    pad: int,
    temperature: float,
    sampling: Sampling,
    over: Callable[[bool], bool] = bool,
) -> Responses:
    """`decode` where no answer ends early, without the tokens between the first and the last.

    Args:
        context: As in `decode`, and so are the others.
        prompts: N rows.
        noise: [N, R].
        greedy: [N] bool.
        stops: [S] token ids.
        pad: Token id.
        temperature: Divides the logits.
        sampling: What may be chosen.
        over: Never asked, since no row stops.
    """
    length = noise.shape[1]
    answers = Answers(prompts, noise, greedy, pad)
    for step in [0, *range(max(length - LAST, 1), length)]:
        chosen = answers.say(step, context.likely(temperature), stops, sampling)
        if step == 0:
            lengthen(context, max(length - LAST, 1) - 1)
        if step + 1 < length:
            context.append(chosen)
    return Responses(answers.tokens, answers.logprobs)


def lengthen(context: Context, tokens: int) -> None:
    """The context after so many more tokens."""
    if isinstance(context, FixedContext):  # has room for all of them
        context.filled += tokens
        context.positions.add_(tokens)
        return
    context.mask = torch.cat([context.mask, context.mask.new_ones(len(context.mask), tokens)], 1)
    context.positions = context.positions[:, -1:] + tokens
    for layer in context.cache.layers:
        window = layer.sliding_window - 1 if layer.is_sliding else None
        if layer.is_sliding:
            layer.cumulative_length += tokens
        layer.keys = longer(layer.keys, tokens, window)  # one at a time, as they grow
        layer.values = longer(layer.values, tokens, window)


def longer(old: Tensor, tokens: int, most: int | None) -> Tensor:
    """[N, heads, t, d] keys or values of more tokens, of `most` at most."""
    shape = list(old.shape)
    shape[-2] = min(shape[-2] + tokens, most or shape[-2] + tokens)
    return old.new_zeros(shape)


def read_ends(network: PreTrainedModel, parts: list[Prompts]) -> list[Begun]:
    """`read_parts`, of which only the first and the last are read.

    Args:
        network: A causal language model.
        parts: Of the prompts.
    """
    begun = [read(network, parts[0])]
    for part in parts[1:-1]:
        cache = DynamicCache(config=network.config)
        for number, layer in enumerate(begun[0].cache.layers):
            if layer.keys is not None:
                cache.update(*(like(old, part) for old in (layer.keys, layer.values)), number)
        begun.append(Begun(cache, like(begun[0].hidden, part)))
    return [*begun, *(read(network, part) for part in parts[1:][-1:])]


def like(first: Tensor, part: Prompts) -> Tensor:
    """What a part leaves in the place of what the first has left."""
    return first.new_zeros(len(part.tokens), *first.shape[1:])

"""From prompts to responses: a decode loop that a reader can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batches import Experience
from lit_align.functional.logprobs import head_factor, head_logits
from lit_align.models.generation.prefill import Prompts, prefill
from lit_align.models.kernels.compile import eager_trunk


class Responses(NamedTuple):
    """What a policy answered."""

    tokens: Tensor  # [N, R] token ids, `pad` after the stop
    logprobs: Tensor  # [N, R] nats, of softmax(logits / temperature), before top-k and top-p


class Sampling(NamedTuple):
    """How a token is chosen, beside the temperature, which belongs to the policy."""

    top_k: int = 0  # tokens that may be chosen, 0 for all
    top_p: float = 1.0  # share of the probability that may be chosen


def likeliest(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """[N, V] probabilities, zero outside the top k and outside the nucleus; not normalised.

    The nucleus is the smallest set of likeliest tokens that holds `top_p` (arXiv:1904.09751).
    """
    probs = logprobs.exp()
    if sampling.top_k:
        kth = probs.topk(min(sampling.top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.where(probs >= kth, 0.0)
    if sampling.top_p < 1.0:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        allowed = before < sampling.top_p * ordered.sum(-1, keepdim=True)
        least = ordered.where(allowed, torch.inf).min(-1, keepdim=True).values
        probs = probs.where(probs >= least, 0.0)
    return probs


def choose(logprobs: Tensor, noise: Tensor, greedy: Tensor, sampling: Sampling) -> Tensor:
    """[N] token ids: the likeliest where `greedy`, else the one at quantile `noise`.

    Inverse-CDF sampling with one number per token makes a sample depend on its own noise alone,
    not on the batch or on the number of ranks.

    Args:
        logprobs: [N, V] nats.
        noise: [N] uniform in [0, 1).
        greedy: [N] bool.
        sampling: What may be chosen.
    """
    mass = likeliest(logprobs, sampling).cumsum(-1)
    total = mass[:, -1:]
    target = (noise.unsqueeze(-1) * total).minimum(torch.nextafter(total, total.new_zeros(1)))
    sampled = torch.searchsorted(mass, target, right=True).squeeze(-1)
    return torch.where(greedy, logprobs.argmax(-1), sampled)


LOOK_EVERY = 8  # tokens between two looks at who has stopped: each waits for the device


def decode(
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
    """Answers of at most R tokens, with a key-value cache; ends when every row has stopped.

    A prompt is read once, however many rows answer it, and rows that have stopped leave the batch.

    Args:
        context: Has read the prompts.
        prompts: N rows; only their prompts are read.
        noise: [N, R] uniform in [0, 1).
        greedy: [N] bool, rows that take the likeliest token.
        stops: [S] token ids that end an answer.
        pad: Token id that stands behind the end.
        temperature: Divides the logits.
        over: Whether to end, given whether all rows have stopped: shards need all ranks' steps.
    """
    answers = Answers(prompts, noise, greedy, pad)
    every = 1 if noise.device.type == "cpu" else LOOK_EVERY
    for step in range(noise.shape[1]):
        chosen = answers.say(step, context.likely(temperature), stops, sampling)
        if (step + 1) % every == 0:
            speaking = (~answers.done).nonzero().squeeze(-1)
            if over(len(speaking) == 0):
                break
            if context.crowds(len(speaking), len(chosen)):
                context.keep(speaking)
                chosen = answers.keep(speaking, chosen)
        if step + 1 < noise.shape[1]:
            context.append(chosen)
    return Responses(answers.tokens, answers.logprobs)


class Answers:
    """What has been answered so far, and by which rows that are still in the batch.

    Args:
        prompts: N rows.
        noise: [N, R] uniform in [0, 1).
        greedy: [N] bool, rows that take the likeliest token.
        pad: Token id that stands behind the end.
    """

    def __init__(self, prompts: Experience, noise: Tensor, greedy: Tensor, pad: int):
        self.noise, self.greedy, self.pad = noise, greedy, pad
        self.tokens = prompts.prompts.new_full(noise.shape, pad)
        self.logprobs = noise.new_zeros(noise.shape)
        self.rows = torch.arange(len(noise), device=noise.device)
        self.done = torch.zeros_like(greedy)  # of the rows in the batch

    def say(self, step: int, likely: Tensor, stops: Tensor, sampling: Sampling) -> Tensor:
        """Writes the next token of each row in the batch; [n] token ids.

        Args:
            step: Place of the token.
            likely: [n, V] nats.
            stops: [S] token ids that end an answer.
            sampling: What may be chosen.
        """
        rows = self.rows
        chosen = choose(likely, self.noise[rows, step], self.greedy[rows], sampling)
        chosen = chosen.where(~self.done, self.pad)
        self.tokens[rows, step] = chosen
        said = likely.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        self.logprobs[rows, step] = said.where(~self.done, 0.0).to(self.logprobs.dtype)
        self.done = self.done | torch.isin(chosen, stops)
        return chosen

    def keep(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Only the rows at [n] places stay in the batch; what they have just said, [n]."""
        self.rows, self.done = self.rows[rows], self.done[rows]
        return chosen[rows]


class Context:
    """What has been said so far: mask, keys and values, and the hidden state of the last token.

    Args:
        network: A causal language model with whole weights.
        prompts: N rows; rows of one `group` share a prompt, which is read once.
        alike: The largest of a number on all ranks, where these share weights.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        prompts: Experience,
        alike: Callable[[int], int] = int,
    ):
        self.network, self.trunk = network, eager_trunk
        layer = network.get_output_embeddings()
        self.head, self.bias = head_factor(layer.weight), layer.bias
        groups = prompts.group if "group" in prompts.fields() else list(range(len(prompts)))
        place = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        first = {group: row for row, group in reversed(list(enumerate(groups)))}
        once = prompts.rows([first[group] for group in place])
        self.mask = once.prompt_mask.long()
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        read = Prompts(once.prompts, self.mask, self.positions)
        self.cache, self.hidden = prefill(network, read, alike)
        if len(place) < len(groups):
            self.keep(torch.tensor([place[group] for group in groups]).to(self.mask.device))

    def read(self, tokens: Tensor) -> None:
        """Takes in [N, t] token ids at `positions`; `hidden` [N, H] is what the head sees next."""
        self.hidden = self.trunk(
            self.network,
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )[:, -1]

    def likely(self, temperature: float) -> Tensor:
        """[N, V] nats of the next token, of softmax(logits / temperature)."""
        return head_logits(self.hidden, self.head, self.bias, temperature).log_softmax(-1)

    def crowds(self, speaking: int, rows: int) -> bool:
        """Whether so few of the batch's rows still speak that the others shall leave it."""
        return 0 < speaking <= 0.75 * rows

    def keep(self, rows: Tensor) -> None:
        """The rows at [n] places of the batch, each as often as it is named."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.hidden = self.hidden[rows]

    def append(self, tokens: Tensor) -> None:
        """Goes on with [N] token ids."""
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.read(tokens.unsqueeze(-1))

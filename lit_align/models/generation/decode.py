"""From prompts to responses: a decode loop that a reader can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batches import Experience
from lit_align.functional.logprobs import head_logits, head_matmul_weight
from lit_align.models.generation.prefill import PromptTensors, prefill
from lit_align.models.kernels.compile import run_trunk_eager


class Responses(NamedTuple):
    """What a policy answered."""

    tokens: Tensor  # [N, R] token ids, `pad_id` after the stop
    logprobs: Tensor  # [N, R] nats, of softmax(logits / temperature), before top-k and top-p


class SamplingParams(NamedTuple):
    """How a token is chosen, beside the temperature, which belongs to the policy."""

    top_k: int = 0  # tokens that may be chosen, 0 for all
    top_p: float = 1.0  # share of the probability that may be chosen


def filter_top_k_top_p(logprobs: Tensor, sampling: SamplingParams) -> Tensor:
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


def sample_tokens(
    logprobs: Tensor, noise: Tensor, is_greedy: Tensor, sampling: SamplingParams
) -> Tensor:
    """[N] token ids: the likeliest where `is_greedy`, else the one at quantile `noise`.

    Inverse-CDF sampling with one number per token makes a sample depend on its own noise alone,
    not on the batch or on the number of ranks.

    Args:
        logprobs: [N, V] nats.
        noise: [N] uniform in [0, 1).
        is_greedy: [N] bool.
        sampling: What may be chosen.
    """
    mass = filter_top_k_top_p(logprobs, sampling).cumsum(-1)
    total = mass[:, -1:]
    target = (noise.unsqueeze(-1) * total).minimum(torch.nextafter(total, total.new_zeros(1)))
    sampled = torch.searchsorted(mass, target, right=True).squeeze(-1)
    return torch.where(is_greedy, logprobs.argmax(-1), sampled)


STOP_CHECK_INTERVAL = 8  # tokens between two looks at who has stopped: each waits for the device


def decode(
    state: DecodeState,
    prompts: Experience,
    noise: Tensor,
    is_greedy: Tensor,
    stop_ids: Tensor,
    pad_id: int,
    temperature: float,
    sampling: SamplingParams,
    all_ranks_done: Callable[[bool], bool] = bool,
) -> Responses:
    """Answers of at most R tokens, with a key-value cache; ends when every row has stopped.

    A prompt is read once, however many rows answer it, and rows that have stopped leave the batch.

    Args:
        state: Has read the prompts.
        prompts: N rows; only their prompts are read.
        noise: [N, R] uniform in [0, 1).
        is_greedy: [N] bool, rows that take the likeliest token.
        stop_ids: [S] token ids that end an answer.
        pad_id: Token id that stands behind the end.
        temperature: Divides the logits.
        all_ranks_done: Whether to end, given whether all rows of this rank have stopped.
    """
    buffer = ResponseBuffer(prompts, noise, is_greedy, pad_id)
    interval = 1 if noise.device.type == "cpu" else STOP_CHECK_INTERVAL
    for step in range(noise.shape[1]):
        next_tokens = buffer.sample_next(
            step, state.next_token_logprobs(temperature), stop_ids, sampling
        )
        if (step + 1) % interval == 0:
            active_rows = (~buffer.done).nonzero().squeeze(-1)
            if all_ranks_done(len(active_rows) == 0):
                break
            if state.should_compact(len(active_rows), len(next_tokens)):
                state.select_rows(active_rows)
                next_tokens = buffer.select_rows(active_rows, next_tokens)
        if step + 1 < noise.shape[1]:
            state.append(next_tokens)
    return Responses(buffer.tokens, buffer.logprobs)


class ResponseBuffer:
    """What has been answered so far, and by which rows that are still in the batch.

    Args:
        prompts: N rows.
        noise: [N, R] uniform in [0, 1).
        is_greedy: [N] bool, rows that take the likeliest token.
        pad_id: Token id that stands behind the end.
    """

    def __init__(self, prompts: Experience, noise: Tensor, is_greedy: Tensor, pad_id: int):
        self.noise, self.is_greedy, self.pad_id = noise, is_greedy, pad_id
        self.tokens = prompts.prompts.new_full(noise.shape, pad_id)
        self.logprobs = noise.new_zeros(noise.shape)
        self.rows = torch.arange(len(noise), device=noise.device)
        self.done = torch.zeros_like(is_greedy)  # of the rows in the batch

    def sample_next(
        self, step: int, next_token_logprobs: Tensor, stop_ids: Tensor, sampling: SamplingParams
    ) -> Tensor:
        """Writes the next token of each row in the batch; [n] token ids.

        Args:
            step: Place of the token.
            next_token_logprobs: [n, V] nats.
            stop_ids: [S] token ids that end an answer.
            sampling: What may be chosen.
        """
        rows = self.rows
        next_tokens = sample_tokens(
            next_token_logprobs, self.noise[rows, step], self.is_greedy[rows], sampling
        )
        next_tokens = next_tokens.where(~self.done, self.pad_id)
        self.tokens[rows, step] = next_tokens
        token_logprobs = next_token_logprobs.gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1)
        self.logprobs[rows, step] = token_logprobs.where(~self.done, 0.0).to(self.logprobs.dtype)
        self.done = self.done | torch.isin(next_tokens, stop_ids)
        return next_tokens

    def select_rows(self, rows: Tensor, next_tokens: Tensor) -> Tensor:
        """Only the rows at [n] places stay in the batch; what they have just said, [n]."""
        self.rows, self.done = self.rows[rows], self.done[rows]
        return next_tokens[rows]


class DecodeState:
    """What has been said so far: mask, keys and values, and the hidden state of the last token.

    Args:
        network: A causal language model with whole weights.
        prompts: N rows; rows of one `group` share a prompt, which is read once.
        max_over_ranks: The largest of a number on all ranks, where these share weights.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        prompts: Experience,
        max_over_ranks: Callable[[int], int] = int,
    ):
        self.network, self.run_trunk = network, run_trunk_eager
        layer = network.get_output_embeddings()
        self.head, self.bias = head_matmul_weight(layer.weight), layer.bias
        groups = prompts.group if "group" in prompts.fields() else list(range(len(prompts)))
        group_index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        first_row = {group: row for row, group in reversed(list(enumerate(groups)))}
        unique_prompts = prompts.rows([first_row[group] for group in group_index])
        self.mask = unique_prompts.prompt_mask.long()
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        prompt_tensors = PromptTensors(unique_prompts.prompts, self.mask, self.positions)
        self.cache, self.hidden = prefill(network, prompt_tensors, max_over_ranks)
        if len(group_index) < len(groups):
            self.select_rows(
                torch.tensor([group_index[group] for group in groups]).to(self.mask.device)
            )

    def forward(self, tokens: Tensor) -> None:
        """Takes in [N, t] token ids at `positions`; `hidden` [N, H] is what the head sees next."""
        self.hidden = self.run_trunk(
            self.network,
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )[:, -1]

    def next_token_logprobs(self, temperature: float) -> Tensor:
        """[N, V] nats of the next token, of softmax(logits / temperature)."""
        return head_logits(self.hidden, self.head, self.bias, temperature).log_softmax(-1)

    def should_compact(self, num_active: int, num_rows: int) -> bool:
        """Whether so few of the batch's rows still speak that the others shall leave it."""
        return 0 < num_active <= 0.75 * num_rows

    def select_rows(self, rows: Tensor) -> None:
        """The rows at [n] places of the batch, each as often as it is named."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.hidden = self.hidden[rows]

    def append(self, tokens: Tensor) -> None:
        """Goes on with [N] token ids."""
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.forward(tokens.unsqueeze(-1))

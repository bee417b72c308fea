"""Decode loop: sample responses token by token from the KV cache.

Shapes: N rows, n rows that are still in the batch, R response tokens, V vocabulary, H hidden.
"""

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
    """Generated responses and the log-probs of their tokens."""

    tokens: Tensor  # [N, R] token ids, `pad_id` after the stop token
    logprobs: Tensor  # [N, R] nats, of softmax(logits / temperature), before top-k and top-p


class SamplingParams(NamedTuple):
    """Sampling parameters. The temperature is an attribute of the policy.

    Args:
        top_k: Number of most likely tokens that can be sampled. 0 means all.
        top_p: Probability mass of the most likely tokens that can be sampled. 1 means all.
    """

    top_k: int = 0
    top_p: float = 1.0


def filter_top_k_top_p(logprobs: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the probabilities [N, V], zero outside top-k and top-p; they are not normalized.

    Top-p is nucleus sampling (arXiv:1904.09751, equation 2): the smallest set of most likely tokens
    with at least `top_p` of the probability.

    Args:
        logprobs: [N, V] nats.
        sampling: Top-k and top-p.

    Example:
        >>> probs = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
        >>> filter_top_k_top_p(probs.log(), SamplingParams(top_k=1)).round(decimals=3).tolist()
        [[0.5, 0.0, 0.0], [0.0, 0.0, 0.75]]
    """
    probs = logprobs.exp()
    if sampling.top_k:
        kth = probs.topk(min(sampling.top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.where(probs >= kth, 0.0)
    if sampling.top_p < 1.0:
        ordered = probs.sort(descending=True).values
        # A token is in the nucleus if the tokens before it have less than `top_p`. The first one
        # always is.
        before = ordered.cumsum(-1) - ordered
        allowed = before < sampling.top_p * ordered.sum(-1, keepdim=True)
        least = ordered.where(allowed, torch.inf).min(-1, keepdim=True).values
        probs = probs.where(probs >= least, 0.0)
    return probs


def sample_tokens(
    logprobs: Tensor, noise: Tensor, is_greedy: Tensor, sampling: SamplingParams
) -> Tensor:
    """Sample one token per row by inverse-CDF sampling: the token at quantile `noise`.

    The token of a row depends only on its own noise, not on batch size or ranks.

    Args:
        logprobs: [N, V] nats.
        noise: [N] uniform in [0, 1).
        is_greedy: [N] bool, True for rows that take the most likely token.
        sampling: Top-k and top-p.

    Returns:
        Token ids [N].

    Example:
        >>> logprobs = torch.tensor([0.25, 0.5, 0.25]).log().expand(3, 3)
        >>> noise, greedy = torch.tensor([0.0, 0.9, 0.9]), torch.tensor([False, False, True])
        >>> sample_tokens(logprobs, noise, greedy, SamplingParams()).tolist()
        [0, 2, 1]
    """
    mass = filter_top_k_top_p(logprobs, sampling).cumsum(-1)
    total = mass[:, -1:]
    # Rounding must not give target == total: searchsorted would return an id beyond the
    # vocabulary.
    target = (noise.unsqueeze(-1) * total).minimum(torch.nextafter(total, total.new_zeros(1)))
    # `right` skips tokens of zero probability in front, also for a noise of 0.
    sampled = torch.searchsorted(mass, target, right=True).squeeze(-1)
    return torch.where(is_greedy, logprobs.argmax(-1), sampled)


# Tokens between two checks for finished rows on a GPU: a check waits for the device.
STOP_CHECK_INTERVAL = 8


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
    """Generate responses of at most R tokens, until every row has stopped.

    Args:
        state: State after prefill.
        prompts: N prompts.
        noise: [N, R] uniform in [0, 1).
        is_greedy: [N] bool, True for rows that take the most likely token.
        stop_ids: [S] ids of stop tokens.
        pad_id: Token id after the stop token.
        temperature: Divisor of the logits.
        sampling: Top-k and top-p.
        all_ranks_done: Gets True if all rows of this rank have stopped. Returns True to end the
            loop.
    """
    buffer = ResponseBuffer(prompts, noise, is_greedy, pad_id)
    interval = 1 if noise.device.type == "cpu" else STOP_CHECK_INTERVAL
    for step in range(noise.shape[1]):
        ids = buffer.sample_next(step, state.next_token_logprobs(temperature), stop_ids, sampling)
        if (step + 1) % interval == 0:
            active_rows = (~buffer.done).nonzero().squeeze(-1)
            if all_ranks_done(len(active_rows) == 0):
                break
            if state.should_compact(len(active_rows), len(ids)):
                state.select_rows(active_rows)
                ids = buffer.select_rows(active_rows, ids)
        if step + 1 < noise.shape[1]:
            state.append(ids)
    return Responses(buffer.tokens, buffer.logprobs)


class ResponseBuffer:
    """Responses so far, and the rows that are still in the batch.

    Args:
        prompts: N prompts.
        noise: [N, R] uniform in [0, 1).
        is_greedy: [N] bool, True for rows that take the most likely token.
        pad_id: Token id after the stop token.
    """

    def __init__(self, prompts: Experience, noise: Tensor, is_greedy: Tensor, pad_id: int):
        self.noise, self.is_greedy, self.pad_id = noise, is_greedy, pad_id
        self.tokens = prompts.prompts.new_full(noise.shape, pad_id)
        self.logprobs = noise.new_zeros(noise.shape)
        self.rows = torch.arange(len(noise), device=noise.device)  # [n] rows still in the batch
        self.done = torch.zeros_like(is_greedy)  # [n] True for rows that have stopped

    def sample_next(
        self, step: int, next_token_logprobs: Tensor, stop_ids: Tensor, sampling: SamplingParams
    ) -> Tensor:
        """Sample and store one token per row of the batch.

        Args:
            step: Index of the token in the response.
            next_token_logprobs: [n, V] nats.
            stop_ids: [S] ids of stop tokens.
            sampling: Top-k and top-p.

        Returns:
            Token ids [n].
        """
        rows = self.rows
        next_tokens = sample_tokens(
            next_token_logprobs, self.noise[rows, step], self.is_greedy[rows], sampling
        )
        # Finished rows stay in the batch until the next compaction, and must write padding.
        next_tokens = next_tokens.where(~self.done, self.pad_id)
        self.tokens[rows, step] = next_tokens
        token_logprobs = next_token_logprobs.gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1)
        self.logprobs[rows, step] = token_logprobs.where(~self.done, 0.0).to(self.logprobs.dtype)
        self.done = self.done | torch.isin(next_tokens, stop_ids)
        return next_tokens

    def select_rows(self, rows: Tensor, next_tokens: Tensor) -> Tensor:
        """Keep the given rows of the batch and return their last tokens.

        Args:
            rows: [m] indices of the rows in the batch.
            next_tokens: [n] last token of each row in the batch.

        Returns:
            Last tokens [m].
        """
        self.rows, self.done = self.rows[rows], self.done[rows]
        return next_tokens[rows]


class DecodeState:
    """State of the decode loop: attention mask, KV cache and last hidden states.

    Args:
        network: Causal language model with unsharded weights.
        prompts: N prompts. Rows of one `group` share a prompt, which is read once.
        max_over_ranks: Function that returns the maximum of a number over all ranks, if they share
            weights.
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
        # From 0 at the first real token, because padding is on the left.
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        prompt_tensors = PromptTensors(unique_prompts.prompts, self.mask, self.positions)
        self.cache, self.hidden = prefill(network, prompt_tensors, max_over_ranks)
        # After prefill each prompt is copied to the rows of its group.
        if len(group_index) < len(groups):
            self.select_rows(
                torch.tensor([group_index[group] for group in groups]).to(self.mask.device)
            )

    def forward(self, tokens: Tensor) -> None:
        """Run tokens at `positions` through the network; updates `cache` and `hidden` [N, H].

        Args:
            tokens: [N, T] token ids.
        """
        self.hidden = self.run_trunk(
            self.network,
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )[:, -1]

    def next_token_logprobs(self, temperature: float) -> Tensor:
        """Return the log-probs [N, V] of the next token, in nats, of softmax(logits / temperature).

        Args:
            temperature: Divisor of the logits.
        """
        return head_logits(self.hidden, self.head, self.bias, temperature).log_softmax(-1)

    def should_compact(self, num_active: int, num_rows: int) -> bool:
        """Return True if at most 75 % of the rows are still generating, so that others are dropped.

        Args:
            num_active: Rows that are still generating.
            num_rows: Rows in the batch.
        """
        # Dropping rows copies the cache, which a few finished rows would not repay.
        return 0 < num_active <= 0.75 * num_rows

    def select_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch.

        Args:
            rows: [n] indices of the rows in the batch, in any order and number.
        """
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.hidden = self.hidden[rows]

    def append(self, tokens: Tensor) -> None:
        """Run one decode step.

        Args:
            tokens: [N] token ids, one per row of the batch.
        """
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.forward(tokens.unsqueeze(-1))

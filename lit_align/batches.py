"""Batches of a training step: tensors, and lists of Python values with one entry per row.

B prompts, G samples of each prompt, N = B*G rows, P prompt tokens, R response tokens, T tokens of
a text. A row of `PreferenceBatch` is a pair of texts. Masks are bool, True = real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Batch:
    """Rows of tensors, of Python lists and of the columns of the data set.

    A field that is not written does not exist. Reading it raises an AttributeError with the names
    of the written fields. A field is never None, so that no code checks for None.

    Args:
        columns: Columns of the data set, one entry per row. Only rewards and tables read them.
        fields: Tensors [N, ...] or lists of N Python values.

    Example:
        >>> batch = Batch({"solution": ["4", "9"]}, scores=torch.tensor([1.0, 0.0]))
        >>> len(batch), batch.scores.tolist(), batch.columns["solution"]
        (2, [1.0, 0.0], ['4', '9'])
    """

    columns: dict[str, list[Any]]
    is_new: list[bool]  # [N] False for rows that fill the last evaluation batch; data module

    def __init__(self, columns: dict[str, list[Any]] | None = None, **fields: Tensor | list[Any]):
        self.columns = columns or {}
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{name}' is not written yet. Written: {', '.join(vars(self))}.")

    def __len__(self) -> int:
        return len(next(field for name, field in vars(self).items() if name != "columns"))

    def fields(self) -> dict[str, Any]:
        """Return all tensors and lists by name, without the columns.

        Example:
            >>> Batch({"id": [7]}, lengths=[3]).fields()
            {'lengths': [3]}
        """
        return {name: field for name, field in vars(self).items() if name != "columns"}

    def map(
        self, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]] = list
    ) -> Self:
        """Return a batch of the same class with changed tensors, lists and columns.

        Args:
            tensors: Function of a tensor [N, ...].
            lists: Function of a list or a column; the default copies it.

        Example:
            >>> Batch(scores=torch.tensor([1.0, 2.0])).map(lambda x: 10 * x).scores.tolist()
            [10.0, 20.0]
        """
        return type(self)(
            columns={name: lists(column) for name, column in self.columns.items()},
            **{
                name: tensors(field) if isinstance(field, Tensor) else lists(field)
                for name, field in self.fields().items()
            },
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on `device`.

        Args:
            device: Target device.
            non_blocking: Do not wait for copies from pinned memory.

        Example:
            >>> Batch(scores=torch.ones(2)).to(torch.device("meta")).scores.is_meta
            True
        """
        return self.map(lambda field: field.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch with its tensors in pinned host memory, for copies without waiting."""
        return self.map(Tensor.pin_memory)

    def rows(self, index: Sequence[int]) -> Self:
        """Return the rows at `index`, in its order.

        Args:
            index: Row numbers; a row may occur several times.

        Example:
            >>> Batch({"id": ["a", "b"]}, lengths=[3, 5], x=torch.eye(2)).rows([1, 1]).fields()
            {'lengths': [5, 5], 'x': tensor([[0., 1.],
                    [0., 1.]])}
        """
        # the index is copied without waiting, since the GPU may still work on earlier steps
        device = next(field.device for field in self.fields().values() if isinstance(field, Tensor))
        rows = torch.tensor(index, dtype=torch.long).to(device, non_blocking=True)
        return self.map(lambda field: field[rows], lambda column: [column[i] for i in index])

    def repeat_interleave(self, times: int) -> Self:
        """Return each row `times` times, the copies of a row next to each other.

        Args:
            times: Copies of each row.

        Example:
            >>> Batch({"id": ["a", "b"]}, x=torch.zeros(2)).repeat_interleave(2).columns
            {'id': ['a', 'a', 'b', 'b']}
        """
        return self.rows([row for row in range(len(self)) for _ in range(times)])

    def concat(self, other: Self) -> Self:
        """Return the rows of this batch, followed by the rows of the other.

        Args:
            other: Batch with the same columns and fields.

        Example:
            >>> Batch(lengths=[3, 5]).concat(Batch(lengths=[4])).lengths
            [3, 5, 4]
        """
        ours, theirs = self.fields(), other.fields()
        return type(self)(
            columns={name: column + other.columns[name] for name, column in self.columns.items()},
            **{
                name: torch.cat([ours[name], theirs[name]])
                if isinstance(ours[name], Tensor)
                else ours[name] + theirs[name]
                for name in ours
            },
        )

    def replace_with(self, other: Batch) -> None:
        """Replace all columns and fields in place, since a callback cannot return a new batch.

        Args:
            other: Batch whose columns and fields are taken.

        Example:
            >>> batch = Batch(lengths=[3, 5])
            >>> batch.replace_with(Batch(scores=[1.0]))
            >>> batch.fields()
            {'scores': [1.0]}
        """
        vars(self).clear()
        vars(self).update(vars(other))


class OfflineResponse(NamedTuple):
    """Response that came with the data set.

    Args:
        tokens: Token ids, stop token included.
        score: Score of the response, None if unknown.
        logprob: Nats of the response under its sampler, summed over its tokens; None if unknown.
    """

    tokens: Sequence[int]
    score: float | None
    logprob: float | None


class Experience(Batch):
    """N rows of one prompt (P tokens) and, after the rollout, one response (R tokens).

    Fields are written from top to bottom.

    Example:
        >>> row = Experience(prompts=torch.tensor([[0, 5]]), prompt_lengths=[1])
        >>> row.responses, row.response_lengths = torch.tensor([[7, 2, 0]]), [2]  # 2 stops, 0 pads
        >>> row.tokens.tolist(), row.lengths
        ([[0, 5, 7, 2, 0]], [3])
    """

    # The data module.
    prompts: Tensor  # [N, P] token ids, left-padded
    prompt_mask: Tensor  # [N, P] bool
    prompt_lengths: list[int]  # [N] tokens
    offline_responses: list[list[OfflineResponse]]  # [N] responses of the data set to each prompt

    # callbacks.Rollout.
    responses: Tensor  # [N, R] token ids, right-padded
    response_mask: Tensor  # [N, R] bool, True through the first stop
    response_lengths: list[int]  # [N] tokens
    truncated: list[bool]  # [N] True without a stop in R tokens
    is_greedy: list[bool]  # [N] True if decoded greedily
    is_offline: list[bool]  # [N] True if the response came with the data set
    offline_scores: list[float | None]  # [N] scores of the data set, None if unknown
    offline_logprobs: list[float | None]  # [N] nats of the data set, None if unknown
    group: list[int]  # [N] index of the row's prompt in the rollout
    sampling_logprobs: Tensor  # [N, R] nats, computed while sampling

    # callbacks.Reward.
    scores: Tensor  # [N] scores of the responses

    # OnlineAlgorithm.
    logprobs: Tensor  # [N, R] nats, under the sampling policy
    entropy: Tensor  # [N, R] nats, of the sampling policy at each token
    ref_logprobs: Tensor  # [N, R] nats, under the reference

    # The algorithm.
    advantages: Tensor  # [N, R] advantages of the tokens; every one but SPR
    values: Tensor  # [N, R] predictions of the critic before each token; PPO
    returns: Tensor  # [N, R] targets of the critic; PPO
    weights: Tensor  # [N] weights of the responses in the SFT loss; SPR

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and response together [N]."""
        pairs = zip(self.prompt_lengths, self.response_lengths, strict=True)
        return [prompt + response for prompt, response in pairs]

    @property
    def is_sampled(self) -> list[bool]:
        """True [N] for rows that the policy sampled: neither greedy nor offline.

        Example:
            >>> Experience(is_greedy=[True, False], is_offline=[False, False]).is_sampled
            [False, True]
        """
        return [not (a or b) for a, b in zip(self.is_greedy, self.is_offline, strict=True)]

    @property
    def tokens(self) -> Tensor:
        """Token ids of prompt and response [N, P+R]."""
        return torch.cat([self.prompts, self.responses], 1)

    @property
    def token_mask(self) -> Tensor:
        """Mask [N, P+R] bool of the tokens that attention reads.

        It includes the tokens in holes of `response_mask`, which are not scored.

        Example:
            >>> row = Experience(prompt_mask=torch.tensor([[False, True]]), response_lengths=[1])
            >>> row.prompts, row.responses = torch.tensor([[0, 5]]), torch.tensor([[2, 0]])
            >>> row.token_mask.tolist()
            [[False, True, True, False]]
        """
        ends = torch.tensor(self.response_lengths).to(self.prompts.device, non_blocking=True)
        steps = torch.arange(self.responses.shape[1], device=self.prompts.device)
        return torch.cat([self.prompt_mask, steps < ends.unsqueeze(1)], 1)

    @property
    def num_context_tokens(self) -> int:
        """Number of tokens before the first scored token, P."""
        return self.prompts.shape[1]

    @property
    def loss_mask(self) -> Tensor:
        """Mask [N, R] bool of the tokens that enter the loss."""
        return self.response_mask

    def trim_padding(self) -> Experience:
        """Return the same rows without the columns that are padding in all of them.

        Example:
            >>> row = Experience(prompts=torch.tensor([[0, 0, 5]]), prompt_lengths=[1])
            >>> row.responses, row.response_lengths = torch.tensor([[7, 2, 0]]), [2]
            >>> row.trim_padding().tokens.tolist()
            [[5, 7, 2]]
        """
        num_padding = self.prompts.shape[1] - max(self.prompt_lengths)
        width, longest = self.responses.shape[1], max(max(self.response_lengths), 1)
        trimmed = Experience(self.columns, **self.fields())
        # prompts by name: they may be as wide as the responses, and their padding is on the left
        for name, field in self.fields().items():
            if isinstance(field, Tensor) and name in ("prompts", "prompt_mask"):
                setattr(trimmed, name, field[:, num_padding:])
            elif isinstance(field, Tensor) and field.ndim > 1 and field.shape[1] == width:
                setattr(trimmed, name, field[:, :longest])
        return trimmed


class TextBatch(Batch):
    """N texts of T tokens, right-padded, for supervised fine-tuning.

    The data module writes all fields.

    Example:
        >>> batch = TextBatch(tokens=torch.tensor([[5, 6, 2, 0]]), lengths=[3])
        >>> batch.target_mask = torch.tensor([[False, True, True, False]])
        >>> batch.responses.tolist(), batch.loss_mask.tolist()
        ([[6, 2, 0]], [[True, True, False]])
    """

    tokens: Tensor  # [N, T] token ids, right-padded
    token_mask: Tensor  # [N, T] bool
    target_mask: Tensor  # [N, T] bool, True for tokens to be learned
    lengths: list[int]  # [N] tokens

    @property
    def response_mask(self) -> Tensor:
        """Mask [N, T-1] bool of the tokens to be learned, without the first token.

        The first token has no context and so no log-prob.
        """
        return self.target_mask[:, 1:]

    @property
    def responses(self) -> Tensor:
        """Token ids [N, T-1] after the first one."""
        return self.tokens[:, 1:]

    @property
    def num_context_tokens(self) -> int:
        """Number of tokens before the first scored token."""
        return 1

    @property
    def loss_mask(self) -> Tensor:
        """Mask [N, T-1] bool of the tokens that enter the loss."""
        return self.response_mask

    def trim_padding(self) -> TextBatch:
        """Return the same rows without the columns that are padding in all of them.

        Example:
            >>> TextBatch(tokens=torch.zeros(2, 9), lengths=[3, 5]).trim_padding().tokens.shape
            torch.Size([2, 5])
        """
        longest = max(max(self.lengths), 2)  # 2, so that one token has a context
        return self.map(lambda field: field[:, :longest])


class PreferenceBatch(Batch):
    """B preference pairs of a chosen and a rejected text with the same prompt.

    Example:
        >>> pair = PreferenceBatch(chosen=torch.tensor([[5, 6, 2]]), margin=torch.tensor([0.5]))
        >>> pair.rejected = torch.tensor([[5, 2, 0]])
        >>> len(pair), pair.loss_mask.tolist()
        (1, [True])
    """

    # The data module.
    chosen: Tensor  # [B, T] token ids, right-padded
    chosen_mask: Tensor  # [B, T] bool
    chosen_target_mask: Tensor  # [B, T] bool, True for the response
    chosen_lengths: list[int]  # [B] tokens
    rejected: Tensor  # [B, T] token ids, right-padded
    rejected_mask: Tensor  # [B, T] bool
    rejected_target_mask: Tensor  # [B, T] bool, True for the response
    rejected_lengths: list[int]  # [B] tokens
    margin: Tensor  # [B] lead that the chosen score should have, 0 if unknown
    fingerprints: list[int]  # [B] hashes of the texts of each pair, equal in any batch

    # DPO.
    ref_chosen: Tensor  # [B] nats, the chosen response under the reference
    ref_rejected: Tensor  # [B] nats, the rejected response under the reference

    @property
    def lengths(self) -> list[int]:
        """Padded tokens of each pair [B], twice its longer text.

        Example:
            >>> PreferenceBatch(chosen_lengths=[2, 5], rejected_lengths=[3, 4]).lengths
            [6, 10]
        """
        both = zip(self.chosen_lengths, self.rejected_lengths, strict=True)
        return [2 * max(chosen, rejected) for chosen, rejected in both]

    @property
    def loss_mask(self) -> Tensor:
        """Mask [B] bool of the pairs that enter the loss, all True."""
        return torch.ones_like(self.margin, dtype=torch.bool)

    def trim_padding(self) -> PreferenceBatch:
        """Return the same pairs without the columns that are padding in all texts.

        Example:
            >>> pair = PreferenceBatch(chosen=torch.zeros(1, 9), rejected=torch.zeros(1, 9))
            >>> pair.chosen_lengths, pair.rejected_lengths = [4], [6]
            >>> pair.trim_padding().chosen.shape
            torch.Size([1, 6])
        """
        longest = max(max(self.chosen_lengths), max(self.rejected_lengths), 2)
        return self.map(lambda field: field[:, :longest] if field.ndim > 1 else field)

    def texts(self) -> TextBatch:
        """Return the 2B texts, each chosen text followed by its rejected one.

        Their scores [2B] have the pairs as rows of `scores.view(-1, 2)`.
        """

        def interleave(one: Tensor, other: Tensor) -> Tensor:
            return torch.stack([one, other], 1).flatten(0, 1)

        both = zip(self.chosen_lengths, self.rejected_lengths, strict=True)
        return TextBatch(
            tokens=interleave(self.chosen, self.rejected),
            token_mask=interleave(self.chosen_mask, self.rejected_mask),
            target_mask=interleave(self.chosen_target_mask, self.rejected_target_mask),
            lengths=[length for pair in both for length in pair],
        )


AnyBatch = Experience | TextBatch | PreferenceBatch


def microbatch_indices(
    lengths: Sequence[int], max_tokens: int, min_microbatches: int = 1
) -> list[list[int]]:
    """Return the rows of each micro-batch: rows of similar length, up to `max_tokens` with padding.

    A row longer than `max_tokens` is a micro-batch of its own.

    Args:
        lengths: [N] tokens of the rows.
        max_tokens: Token budget of a micro-batch, padding included.
        min_microbatches: Least number of micro-batches. Ranks that step together need equal
            numbers of passes.

    Example:
        >>> microbatch_indices([2, 5, 1, 4], max_tokens=10)
        [[1, 3], [0, 2]]
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    while len(groups) < min_microbatches:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = (len(groups[largest]) + 1) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups

"""What flows through a training step: rows of tensors, and the Python facts that belong to them.

B prompts, G samples of each, N = B*G rows, P prompt tokens, R response tokens, T = tokens of a
whole text. A row of `PreferenceBatch` is a pair of texts. Masks are bool, True = real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Batch:
    """Rows that stay in step: tensors, Python lists with one entry per row, and data columns.

    A field that nobody wrote does not exist: reading it is an AttributeError that names what
    does. Never None, so never a check for None.

    Args:
        columns: The data set's own columns, one entry per row; only rewards and tables read it.
        fields: Tensors [N, ...] or lists of N Python values.
    """

    columns: dict[str, list[Any]]
    is_new: list[bool]  # [N] False on rows that only fill up a round of evaluation; data module

    def __init__(self, columns: dict[str, list[Any]] | None = None, **fields: Tensor | list[Any]):
        self.columns = columns or {}
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{name}' is not written yet; so far: {', '.join(vars(self))}")

    def __len__(self) -> int:
        return len(next(field for name, field in vars(self).items() if name != "columns"))

    def fields(self) -> dict[str, Any]:
        """Everything but the columns, by name."""
        return {name: field for name, field in vars(self).items() if name != "columns"}

    def map(
        self, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]] = list
    ) -> Self:
        """A batch of the same kind with each tensor and each list changed."""
        return type(self)(
            columns={name: lists(column) for name, column in self.columns.items()},
            **{
                name: tensors(field) if isinstance(field, Tensor) else lists(field)
                for name, field in self.fields().items()
            },
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The tensors on `device`; lists and columns stay where they are."""
        return self.map(lambda field: field.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The tensors in page-locked host memory, from which a GPU copies without waiting."""
        return self.map(Tensor.pin_memory)

    def rows(self, index: Sequence[int]) -> Self:
        """The rows at `index`, in its order."""
        device = next(field.device for field in self.fields().values() if isinstance(field, Tensor))
        rows = torch.tensor(index, dtype=torch.long).to(device, non_blocking=True)
        return self.map(lambda field: field[rows], lambda column: [column[i] for i in index])

    def repeat_interleave(self, times: int) -> Self:
        """Each row `times` times, the copies of a row side by side."""
        return self.rows([row for row in range(len(self)) for _ in range(times)])

    def concat(self, other: Self) -> Self:
        """The rows of both, the other's behind; both have the same columns and fields."""
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
        """Takes on all rows and fields of `other`: a callback cannot return a new batch."""
        vars(self).clear()
        vars(self).update(vars(other))


class OfflineResponse(NamedTuple):
    """An answer that came with the data.

    Args:
        tokens: Token ids, the stop included.
        score: The reward of the answer, where it is known.
        logprob: Nats of the answer under whoever gave it, summed over its tokens, where known.
    """

    tokens: Sequence[int]
    score: float | None
    logprob: float | None


class Experience(Batch):
    """N rows, each one prompt of P tokens and, once answered, one response of R tokens.

    Fields are written from top to bottom.
    """

    prompts: Tensor  # [N, P] token ids, left-padded                          data module
    prompt_mask: Tensor  # [N, P] bool                                        data module
    prompt_lengths: list[int]  # [N] tokens                                   data module
    offline_responses: list[
        list[OfflineResponse]
    ]  # [N] those in the data, of each prompt data.OfflineResponseData
    responses: Tensor  # [N, R] token ids, right-padded                       callbacks.Rollout
    response_mask: Tensor  # [N, R] bool, True through the first stop         callbacks.Rollout
    response_lengths: list[int]  # [N] tokens                                 callbacks.Rollout
    truncated: list[bool]  # [N] no stop within R tokens                      callbacks.Rollout
    is_greedy: list[bool]  # [N] decoded greedily                                callbacks.Rollout
    is_offline: list[bool]  # [N] came with the data                              callbacks.Rollout
    offline_scores: list[float | None]  # [N] the data's, where known          callbacks.Rollout
    offline_logprobs: list[float | None]  # [N] nats, the data's, where known  callbacks.Rollout
    group: list[int]  # [N] which prompt of the rollout a row answers         callbacks.Rollout
    sampling_logprobs: Tensor  # [N, R] nats, as seen while sampling          callbacks.Rollout
    scores: Tensor  # [N] reward of the whole response                        callbacks.Reward
    logprobs: Tensor  # [N, R] nats, under the sampling policy                OnlineAlgorithm
    entropy: Tensor  # [N, R] nats, of the sampling policy at each token      OnlineAlgorithm
    ref_logprobs: Tensor  # [N, R] nats, under the reference                  OnlineAlgorithm
    advantages: Tensor  # [N, R] credit of each response token                every algorithm
    values: Tensor  # [N, R] the critic's, before each token                  PPO
    returns: Tensor  # [N, R] what the values should have been                PPO
    weights: Tensor  # [N] of a whole response in the SFT loss                SPR

    @property
    def lengths(self) -> list[int]:
        """[N] tokens of prompt and response together."""
        pairs = zip(self.prompt_lengths, self.response_lengths, strict=True)
        return [prompt + response for prompt, response in pairs]

    @property
    def is_sampled(self) -> list[bool]:
        """[N] whether the policy has sampled it: neither decoded greedily nor from the data."""
        return [not (a or b) for a, b in zip(self.is_greedy, self.is_offline, strict=True)]

    @property
    def tokens(self) -> Tensor:
        """[N, P+R] token ids of prompt and response."""
        return torch.cat([self.prompts, self.responses], 1)

    @property
    def token_mask(self) -> Tensor:
        """[N, P+R] bool, what attention sees: holes in `response_mask` are seen, not scored."""
        ends = torch.tensor(self.response_lengths).to(self.prompts.device, non_blocking=True)
        steps = torch.arange(self.responses.shape[1], device=self.prompts.device)
        return torch.cat([self.prompt_mask, steps < ends.unsqueeze(1)], 1)

    @property
    def num_context_tokens(self) -> int:
        """P: tokens before the first scored one."""
        return self.prompts.shape[1]

    @property
    def loss_mask(self) -> Tensor:
        """[N, R] bool: where a loss counts."""
        return self.response_mask

    def trim_padding(self) -> Experience:
        """The same rows without the columns that are padding in every one of them."""
        num_padding = self.prompts.shape[1] - max(self.prompt_lengths)
        width, longest = self.responses.shape[1], max(max(self.response_lengths), 1)
        trimmed = Experience(self.columns, **self.fields())
        for name, field in self.fields().items():
            if isinstance(field, Tensor) and name in ("prompts", "prompt_mask"):
                setattr(trimmed, name, field[:, num_padding:])
            elif isinstance(field, Tensor) and field.ndim > 1 and field.shape[1] == width:
                setattr(trimmed, name, field[:, :longest])
        return trimmed


class TextBatch(Batch):
    """N whole texts of T tokens, right-padded, for supervised fine-tuning."""

    tokens: Tensor  # [N, T] token ids, right-padded                          data module
    token_mask: Tensor  # [N, T] bool                                         data module
    target_mask: Tensor  # [N, T] bool, True where the token is to be learnt    data module
    lengths: list[int]  # [N] tokens                                          data module

    @property
    def response_mask(self) -> Tensor:
        """[N, T-1] bool: the learnt tokens. The first token has no context to be scored in."""
        return self.target_mask[:, 1:]

    @property
    def responses(self) -> Tensor:
        """[N, T-1] token ids that have a context."""
        return self.tokens[:, 1:]

    @property
    def num_context_tokens(self) -> int:
        """Tokens before the first scored one."""
        return 1

    @property
    def loss_mask(self) -> Tensor:
        """[N, T-1] bool: where a loss counts."""
        return self.response_mask

    def trim_padding(self) -> TextBatch:
        """The same rows without the columns that are padding in every one of them."""
        longest = max(max(self.lengths), 2)
        return self.map(lambda field: field[:, :longest])


class PreferenceBatch(Batch):
    """B preference pairs: a chosen and a rejected text that share a prompt."""

    chosen: Tensor  # [B, T] token ids, right-padded                          data module
    chosen_mask: Tensor  # [B, T] bool                                        data module
    chosen_target_mask: Tensor  # [B, T] bool, True on the answer               data module
    chosen_lengths: list[int]  # [B] tokens                                   data module
    rejected: Tensor  # [B, T], and the same three                            data module
    rejected_mask: Tensor
    rejected_target_mask: Tensor
    rejected_lengths: list[int]
    margin: Tensor  # [B] by how much the chosen text should win, 0 unknown   data module
    fingerprints: list[int]  # [B] of each pair's texts, in any batch         data module
    ref_chosen: Tensor  # [B] nats, the chosen answer under the reference     DPO
    ref_rejected: Tensor  # [B] nats, the rejected answer                     DPO

    @property
    def lengths(self) -> list[int]:
        """[B] tokens of the longer text, twice: what a pair costs."""
        both = zip(self.chosen_lengths, self.rejected_lengths, strict=True)
        return [2 * max(chosen, rejected) for chosen, rejected in both]

    @property
    def loss_mask(self) -> Tensor:
        """[B] bool: where a loss counts, every pair."""
        return torch.ones_like(self.margin, dtype=torch.bool)

    def trim_padding(self) -> PreferenceBatch:
        """The same pairs without the columns that are padding in every text."""
        longest = max(max(self.chosen_lengths), max(self.rejected_lengths), 2)
        return self.map(lambda field: field[:, :longest] if field.ndim > 1 else field)

    def texts(self) -> TextBatch:
        """2B rows, chosen and rejected of a pair side by side: scores.view(-1, 2)."""

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
    """Rows of similar length together, each group at most `max_tokens` padded tokens.

    A row longer than the budget stands alone. Groups are split further until there are
    `min_microbatches` of them: ranks that step together must make the same number of passes.
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

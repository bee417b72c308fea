"""A frozen reward model with its own tokenizer and chat template."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_align.batches import Experience, TextBatch, microbatch_indices
from lit_align.data.text import encode_response, load_tokenizer
from lit_align.errors import UserError
from lit_align.models.parallel.offload import OffloadedTensors
from lit_align.models.roles import Role, single_head_role
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.base import RewardFunction


class RewardNetwork(ScalarHead):
    """A trained reward model. Weights without a head are refused."""

    new_weights: ClassVar[tuple[str, ...]] = ()


class ModelReward(RewardFunction):
    """Score of a frozen sequence classifier at the last token of prompt and response.

    The text is encoded again, so the reward model needs no tokens of the policy. A truncated
    response gets no stop token. The weights are in no checkpoint and no optimizer, and on the
    device only during scoring.

    Args:
        path: Hub id or folder of the reward model and its tokenizer.
        chat_template: Chat template of the reward model. Default: that of its tokenizer.
        max_tokens: Most tokens of a text, in the reward model's tokens. A longer text is cut at
            its start.
        tokens_per_pass: Padded tokens per forward pass. Changes the memory, never the scores.
        dtype: Data type of the weights. Default: that of `trainer.precision`.
    """

    network: RewardNetwork

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        max_tokens: int = 2048,
        tokens_per_pass: int = 16384,
        dtype: str | None = None,
    ):
        if max_tokens < 1:
            raise UserError(
                f"max_tokens must be at least 1, found {max_tokens}. Set "
                f"--reward.functions.max_tokens."
            )
        self.path, self.chat_template, self.dtype = path, chat_template, dtype
        self.max_tokens, self.tokens_per_pass = max_tokens, tokens_per_pass

    def setup(self, algorithm: LightningModule) -> None:
        """Load tokenizer and weights, once."""
        if "network" in vars(self):  # Lightning calls `setup` before every fit, validate and test
            return
        self.tokenizer = load_tokenizer(self.path, self.chat_template)
        self.network = RewardNetwork(self.path, dtype=self.dtype).eval().requires_grad_(False)
        self.offloaded_weights = OffloadedTensors(lambda: self.network.parameters(), is_frozen=True)

    def all_roles(self) -> list[Role]:
        """Return the reward model as the role `reward`."""
        return [single_head_role("reward", self.network)]

    def __call__(self, batch: Experience) -> Tensor:
        """Return the scores [N]."""
        texts = self.encode(batch)
        scores = torch.zeros(len(texts), dtype=torch.float32, device=batch.responses.device)
        self.offloaded_weights.reload()
        self.network.to(scores.device)  # the first call: the device is not known in `setup`
        for rows in microbatch_indices([len(text) for text in texts], self.tokens_per_pass):
            tokens = right_pad_texts([texts[row] for row in rows]).to(scores.device)
            scores[rows] = self.network.scores(tokens).float()
        self.offloaded_weights.offload()
        return scores

    def encode(self, batch: Experience) -> list[list[int]]:
        """Return the reward model's token ids of prompt and completion, for N rows.

        Args:
            batch: N rows with responses.
        """
        prompts, completions = batch.columns["prompt"], batch.columns["completion"]
        texts = []
        for prompt, completion, is_truncated in zip(
            prompts, completions, batch.truncated, strict=True
        ):
            before, after = encode_response(self.tokenizer, prompt, completion)
            # `encode_response` appends the stop token, which a truncated response does not have.
            text = [*before, *after[: len(after) - is_truncated]]
            texts.append(text[-self.max_tokens :])
        return texts


def right_pad_texts(texts: list[list[int]]) -> TextBatch:
    """Return n texts as one batch [n, T], padded at the right.

    Args:
        texts: Token ids of each text.

    Example:
        >>> right_pad_texts([[5, 6], [7]]).tokens.tolist()
        [[5, 6], [7, 0]]
    """
    lengths = [len(text) for text in texts]
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    return TextBatch(tokens=tokens, token_mask=mask, target_mask=mask, lengths=lengths)

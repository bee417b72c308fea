"""Data of a plan: batches of random tokens with the maximum length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batches import AnyBatch, Experience, OfflineResponse, PreferenceBatch, TextBatch
from lit_align.data.base import TextDataModule
from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.data.prompts import PromptData
from lit_align.data.rated_pairs import RatedPairs
from lit_align.errors import UserError

NUM_BATCHES = 2  # the first creates the optimizer state, the second starts with it
FIRST_TOKEN_ID = 4  # lower ids may be special tokens


class MaxLengthData(LightningDataModule):
    """Batches in which every row is as long as the data section allows.

    Args:
        data: Data section of the run; its rows are not read.
        prompt_tokens: Tokens of each prompt or text. Default: the maximum of the data section.
        response_tokens: Tokens of each offline response.
        num_offline_samples: Offline responses per prompt.
        vocabulary: Upper limit of token ids, exclusive.
    """

    def __init__(
        self,
        data: TextDataModule,
        prompt_tokens: int | None = None,
        response_tokens: int = 0,
        num_offline_samples: int = 0,
        vocabulary: int = 5,
    ):
        super().__init__()
        self.data_class, self.batch_size, self.vocabulary = type(data), data.batch_size, vocabulary
        max_tokens = (
            data.max_prompt_tokens if isinstance(data, PromptData) else max_text_tokens(data)
        )
        self.width = prompt_tokens or max_tokens
        if self.width > max_tokens:
            raise UserError(
                f"--prompt_tokens {self.width} is more than the {max_tokens} tokens that the data "
                f"section allows. Set --data.max_prompt_tokens or --data.max_tokens."
            )
        self.response_tokens, self.num_offline_samples = response_tokens, num_offline_samples
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.stop_ids: list[int] = []  # no response ends early

    def decode(self, ids: list[int]) -> str:
        """Return an empty text. A plan has token ids only.

        Args:
            ids: Token ids.
        """
        return ""

    def train_dataloader(self) -> DataLoader[int]:
        """Return a loader of NUM_BATCHES batches."""
        indices: Any = range(NUM_BATCHES)
        return DataLoader(indices, batch_size=1, collate_fn=self.batch)

    def batch(self, indices: list[int]) -> AnyBatch:
        """Return a batch for the class of the data section.

        Args:
            indices: Number of the batch; not used.
        """
        if issubclass(self.data_class, PromptData):
            return self.prompt_batch()
        return (
            self.text_batch() if issubclass(self.data_class, InstructionData) else self.pair_batch()
        )

    def random_ids(self) -> tuple[Tensor, list[int]]:
        """Return random token ids [B, T] and the length of each row."""
        # Every second row is one token shorter. Equal lengths would skip mask and packing and give
        # a too low estimate.
        lengths = [max(self.width - row % 2, 1) for row in range(self.batch_size)]
        return torch.randint(
            FIRST_TOKEN_ID, self.vocabulary, (self.batch_size, self.width)
        ), lengths

    def prompt_batch(self) -> Experience:
        """Return left-padded prompts [B, P], with offline responses if the algorithm reads them."""
        (tokens, lengths), rows = self.random_ids(), self.batch_size
        num_padding = self.width - torch.tensor(lengths).unsqueeze(1)
        response = OfflineResponse([FIRST_TOKEN_ID] * self.response_tokens, None, None)
        offline = (
            {"offline_responses": [[response] * self.num_offline_samples] * rows}
            if self.num_offline_samples
            else {}
        )
        return Experience(
            {"prompt": [""] * rows},
            prompts=tokens,
            prompt_mask=torch.arange(self.width) >= num_padding,
            prompt_lengths=lengths,
            **offline,
        )

    def text_batch(self) -> TextBatch:
        """Return texts [B, T] in which all tokens but the first are targets."""
        tokens, lengths = self.random_ids()
        token_mask = torch.arange(self.width) < torch.tensor(lengths).unsqueeze(1)
        loss_mask = token_mask & (torch.arange(self.width) > 0)
        return TextBatch(
            tokens=tokens, token_mask=token_mask, target_mask=loss_mask, lengths=lengths
        )

    def pair_batch(self) -> PreferenceBatch:
        """Return pairs of two texts [B, T]."""
        sides: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            text = self.text_batch()
            sides |= {
                side: text.tokens,
                f"{side}_mask": text.token_mask,
                f"{side}_target_mask": text.target_mask,
                f"{side}_lengths": text.lengths,
            }
        margin = torch.zeros(self.batch_size)
        return PreferenceBatch(**sides, margin=margin, fingerprints=[0] * self.batch_size)


def max_text_tokens(data: TextDataModule) -> int:
    """Return the maximum tokens of a text in a data section.

    Args:
        data: Data section of supervised texts or of pairs.
    """
    if not isinstance(data, PreferenceData | RatedPairs | InstructionData):
        raise UserError(
            f"lit-align plan does not know the maximum length of {type(data).__name__}. Set --data "
            f"to PromptData, InstructionData, PreferenceData or RatedPairs."
        )
    return data.max_tokens

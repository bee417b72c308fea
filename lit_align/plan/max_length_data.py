"""What a plan is made with: batches of the longest texts, answers of the longest length."""

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

NUM_BATCHES = 2  # the first makes the optimizer's state, the second has it from the beginning
FIRST_TOKEN_ID = 4  # token ids from here on are words, in every vocabulary that a test may have


class MaxLengthData(LightningDataModule):
    """Batches whose every row is as long as the data section allows.

    Args:
        data: The data section; its rows are never read.
        prompt_tokens: Of each prompt; by default the most that data allow.
        response_tokens: Of each answer that comes with the data.
        num_offline_samples: Such answers per prompt.
        vocabulary: Token ids are below.
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
                f"--prompt_tokens {self.width} is more than the {max_tokens} that the data allow."
            )
        self.response_tokens, self.num_offline_samples = response_tokens, num_offline_samples
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.stop_ids: list[int] = []  # no answer ends early

    def decode(self, ids: list[int]) -> str:
        """No text: nothing here reads one."""
        return ""

    def train_dataloader(self) -> DataLoader[int]:
        """Two batches."""
        indices: Any = range(NUM_BATCHES)
        return DataLoader(indices, batch_size=1, collate_fn=self.batch)

    def batch(self, indices: list[int]) -> AnyBatch:
        """One batch, whatever its number."""
        if issubclass(self.data_class, PromptData):
            return self.prompt_batch()
        return (
            self.text_batch() if issubclass(self.data_class, InstructionData) else self.pair_batch()
        )

    def random_ids(self) -> tuple[Tensor, list[int]]:
        """[B, T] token ids, and the rows' lengths: each other one is a token shorter.

        Rows of one length would need no mask and no moving, which no data set spares.
        """
        lengths = [max(self.width - row % 2, 1) for row in range(self.batch_size)]
        return torch.randint(
            FIRST_TOKEN_ID, self.vocabulary, (self.batch_size, self.width)
        ), lengths

    def prompt_batch(self) -> Experience:
        """Prompts, left-padded, and what the data answer."""
        (tokens, lengths), rows = self.random_ids(), self.batch_size
        num_padding = self.width - torch.tensor(lengths).unsqueeze(1)
        answer = OfflineResponse([FIRST_TOKEN_ID] * self.response_tokens, None, None)
        offline = (
            {"offline_responses": [[answer] * self.num_offline_samples] * rows}
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
        """Texts that are learnt from the second token on."""
        tokens, lengths = self.random_ids()
        token_mask = torch.arange(self.width) < torch.tensor(lengths).unsqueeze(1)
        loss_mask = token_mask & (torch.arange(self.width) > 0)
        return TextBatch(
            tokens=tokens, token_mask=token_mask, target_mask=loss_mask, lengths=lengths
        )

    def pair_batch(self) -> PreferenceBatch:
        """Pairs of two such texts."""
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
    """Most tokens of a text that a data module lets through."""
    if not isinstance(data, PreferenceData | RatedPairs | InstructionData):
        raise UserError(
            f"plan knows how long the texts of PromptData, InstructionData, PreferenceData and "
            f"RatedPairs may be, and of {type(data).__name__} it does not: take one of these."
        )
    return data.max_tokens

"""What a plan is made with: batches of the longest texts, answers of the longest length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batches import Answer, AnyBatch, Experience, Pairs, Tokens
from lit_align.data.base import TextData
from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.data.prompts import PromptData
from lit_align.data.rated_pairs import RatedPairs

BATCHES = 2  # the first makes the optimizer's state, the second has it from the beginning
FIRST = 4  # token ids from here on are words, in every vocabulary that a test may have


class Longest(LightningDataModule):
    """Batches whose every row is as long as the data section allows.

    Args:
        data: The data section; its rows are never read.
        prompt_tokens: Of each prompt; by default the most that data allow.
        answer_tokens: Of each answer that comes with the data.
        num_stored: Such answers per prompt.
        vocabulary: Token ids are below.
    """

    def __init__(
        self,
        data: TextData,
        prompt_tokens: int | None = None,
        answer_tokens: int = 0,
        num_stored: int = 0,
        vocabulary: int = 5,
    ):
        super().__init__()
        self.kind, self.batch_size, self.vocabulary = type(data), data.batch_size, vocabulary
        most = data.max_prompt_tokens if isinstance(data, PromptData) else longest_text(data)
        self.width = prompt_tokens or most
        if self.width > most:
            raise ValueError(
                f"--prompt_tokens {self.width} is more than the {most} that the data allow."
            )
        self.answer_tokens, self.num_stored = answer_tokens, num_stored
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.stop_ids: list[int] = []  # no answer ends early

    def decode(self, ids: list[int]) -> str:
        """No text: nothing here reads one."""
        return ""

    def train_dataloader(self) -> DataLoader[int]:
        """Two batches."""
        numbers: Any = range(BATCHES)
        return DataLoader(numbers, batch_size=1, collate_fn=self.batch)

    def batch(self, numbers: list[int]) -> AnyBatch:
        """One batch, whatever its number."""
        if issubclass(self.kind, PromptData):
            return self.prompts()
        return self.texts() if issubclass(self.kind, InstructionData) else self.pairs()

    def ids(self) -> tuple[Tensor, list[int]]:
        """[B, T] token ids, and the rows' lengths: each other one is a token shorter.

        Rows of one length would need no mask and no moving, which no data set spares.
        """
        lengths = [max(self.width - row % 2, 1) for row in range(self.batch_size)]
        return torch.randint(FIRST, self.vocabulary, (self.batch_size, self.width)), lengths

    def prompts(self) -> Experience:
        """Prompts, left-padded, and what the data answer."""
        (tokens, lengths), rows = self.ids(), self.batch_size
        spare = self.width - torch.tensor(lengths).unsqueeze(1)
        answer = Answer([FIRST] * self.answer_tokens, None, None)
        stored = {"answers": [[answer] * self.num_stored] * rows} if self.num_stored else {}
        return Experience(
            {"prompt": [""] * rows},
            prompts=tokens,
            prompt_mask=torch.arange(self.width) >= spare,
            prompt_lengths=lengths,
            **stored,
        )

    def texts(self) -> Tokens:
        """Texts that are learnt from the second token on."""
        tokens, lengths = self.ids()
        real = torch.arange(self.width) < torch.tensor(lengths).unsqueeze(1)
        learnt = real & (torch.arange(self.width) > 0)
        return Tokens(tokens=tokens, token_mask=real, loss_mask=learnt, lengths=lengths)

    def pairs(self) -> Pairs:
        """Pairs of two such texts."""
        sides: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            text = self.texts()
            sides |= {
                side: text.tokens,
                f"{side}_mask": text.token_mask,
                f"{side}_loss_mask": text.loss_mask,
                f"{side}_lengths": text.lengths,
            }
        margin = torch.zeros(self.batch_size)
        return Pairs(**sides, margin=margin, fingerprints=[0] * self.batch_size)


def longest_text(data: TextData) -> int:
    """Most tokens of a text that a data module lets through."""
    if not isinstance(data, PreferenceData | RatedPairs | InstructionData):
        raise ValueError(
            f"plan knows how long the texts of PromptData, InstructionData, PreferenceData and "
            f"RatedPairs may be, and of {type(data).__name__} it does not: take one of these."
        )
    return data.max_tokens

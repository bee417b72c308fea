"""Preference pairs for reward models and offline algorithms."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lit_align.batches import Batch, PreferenceBatch
from lit_align.data.base import TextDataModule
from lit_align.data.formats import canonical_row, missing_columns_error
from lit_align.data.padding import pad_right
from lit_align.data.sources import Row
from lit_align.data.text import encode_response


class PreferenceData(TextDataModule):
    """Pairs of a chosen and a rejected text, right-padded to one length.

    Reads `chosen` and `rejected`, with the prompt in `prompt` or at the start of both, and the
    optional `margin`. Pairs of equal responses are dropped.

    Args:
        max_tokens: Most tokens of prompt and response together. A longer response is cut and then
            has no stop token.
        **kwargs: Arguments of TextDataModule.

    Example:
        >>> data = PreferenceData("toy", tokenizer="toy")
        >>> pair = data.encode({"prompt": "review of", "chosen": "good", "rejected": "the plot"})
        >>> len(pair.chosen), len(pair.rejected), pair.num_prompt_tokens
        (5, 6, 3)
    """

    def __init__(self, *args: Any, max_tokens: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> EncodedPair | None:
        """Return the token ids of a pair, or None if it is dropped."""
        row = canonical_row(row)
        if "chosen" not in row or "rejected" not in row:
            raise missing_columns_error(row, "chosen and rejected")
        prompt, chosen = encode_response(self.tokenizer, row["prompt"], row["chosen"])
        rejected = encode_response(self.tokenizer, row["prompt"], row["rejected"])[1]
        max_response_tokens = self.max_tokens - len(prompt)
        if max_response_tokens <= 0:
            self.dropped[f"prompts that fill max_tokens {self.max_tokens}"] += 1
            return None
        if max(len(chosen), len(rejected)) > max_response_tokens:
            self.truncated[f"pairs of more than max_tokens {self.max_tokens}"] += 1
        if chosen[:max_response_tokens] == rejected[:max_response_tokens]:
            self.dropped["pairs of equal responses"] += 1
            return None
        texts = [
            array("i", prompt + response[:max_response_tokens]) for response in (chosen, rejected)
        ]
        return EncodedPair(texts[0], texts[1], len(prompt), float(row.get("margin", 0.0)))

    def collate_fn(self) -> Callable[..., Batch]:
        """Return a function that makes a PreferenceBatch."""
        return partial(collate_pairs, self.tokenizer.pad_token_id)


class EncodedPair(NamedTuple):
    """One encoded row.

    Args:
        chosen: Token ids of the prompt and the chosen response.
        rejected: Token ids of the prompt and the rejected response.
        num_prompt_tokens: Tokens of the prompt.
        margin: Least score difference that training aims at. 0: any.
    """

    chosen: array[int]
    rejected: array[int]
    num_prompt_tokens: int
    margin: float

    @property
    def fingerprint(self) -> int:
        """64-bit hash of the texts. Equal pairs have equal hashes in any process and batch."""
        sizes = array("i", [self.num_prompt_tokens, len(self.chosen)])
        texts = sizes.tobytes() + self.chosen.tobytes() + self.rejected.tobytes()
        return int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), signed=True)


def collate_pairs(pad: int, examples: list[EncodedPair], **flags: Any) -> PreferenceBatch:
    """Return a batch of B pairs, with chosen and rejected texts [B, T] of one width.

    Args:
        pad: Token id of the padding.
        examples: B encoded pairs.
        **flags: Other fields of the batch.

    Example:
        >>> pair = EncodedPair(array("i", [5, 6]), array("i", [5, 7, 8]), 1, 0.0)
        >>> batch = collate_pairs(0, [pair])
        >>> batch.chosen.tolist(), batch.chosen_target_mask.tolist()
        ([[5, 6, 0]], [[False, True, False]])
    """
    fields: dict[str, Any] = {}
    width = max(len(text) for pair in examples for text in (pair.chosen, pair.rejected))
    starts = torch.tensor([pair.num_prompt_tokens for pair in examples]).unsqueeze(1)
    for side, texts in (
        ("chosen", [pair.chosen for pair in examples]),
        ("rejected", [pair.rejected for pair in examples]),
    ):
        tokens, mask, lengths = pad_right(texts, pad, width)
        fields |= {side: tokens, f"{side}_mask": mask, f"{side}_lengths": lengths}
        fields[f"{side}_target_mask"] = mask & (torch.arange(width) >= starts)
    fields["margin"] = torch.tensor([pair.margin for pair in examples])
    fields["fingerprints"] = [pair.fingerprint for pair in examples]
    return PreferenceBatch(**fields, **flags)

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

    Reads `chosen` and `rejected`, with `prompt` or with the prompt inside both, and the optional
    `margin`. Pairs whose answers are the same are dropped.

    Args:
        max_tokens: Where prompt and answer together are cut, in tokens; a cut answer has no stop.
        **kwargs: Those of TextDataModule.
    """

    def __init__(self, *args: Any, max_tokens: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> EncodedPair | None:
        """Token ids of a prompt and its two answers."""
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
            self.dropped["pairs of which both answers are the same"] += 1
            return None
        texts = [
            array("i", prompt + response[:max_response_tokens]) for response in (chosen, rejected)
        ]
        return EncodedPair(texts[0], texts[1], len(prompt), float(row.get("margin", 0.0)))

    def collate_fn(self) -> Callable[..., Batch]:
        """Makes PreferenceBatch."""
        return partial(collate_pairs, self.tokenizer.pad_token_id)


class EncodedPair(NamedTuple):
    """One encoded row.

    Args:
        chosen: Token ids of the prompt and the better answer.
        rejected: Token ids of the prompt and the worse answer.
        num_prompt_tokens: Tokens of the prompt.
        margin: By how much the better answer should win.
    """

    chosen: array[int]
    rejected: array[int]
    num_prompt_tokens: int
    margin: float

    @property
    def fingerprint(self) -> int:
        """64 bits of the texts: the same wherever the pair stands, and no other pair's."""
        sizes = array("i", [self.num_prompt_tokens, len(self.chosen)])
        texts = sizes.tobytes() + self.chosen.tobytes() + self.rejected.tobytes()
        return int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), signed=True)


def collate_pairs(pad: int, examples: list[EncodedPair], **flags: Any) -> PreferenceBatch:
    """Pairs of one batch, all texts right-padded to the longest."""
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

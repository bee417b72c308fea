"""Preference pairs for reward models and offline algorithms."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lit_align.batches import Batch, Pairs
from lit_align.data.base import TextData
from lit_align.data.formats import canonical, missing
from lit_align.data.padding import pad_right
from lit_align.data.sources import Row
from lit_align.data.text import encode_answer


class PreferenceData(TextData):
    """Pairs of a chosen and a rejected text, right-padded to one length.

    Reads `chosen` and `rejected`, with `prompt` or with the prompt inside both, and the optional
    `margin`. Pairs whose answers are the same are dropped.

    Args:
        max_tokens: Where prompt and answer together are cut, in tokens; a cut answer has no stop.
        **kwargs: Those of TextData.
    """

    def __init__(self, *args: Any, max_tokens: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> Pair | None:
        """Token ids of a prompt and its two answers."""
        row = canonical(row)
        if "chosen" not in row or "rejected" not in row:
            raise missing(row, "chosen and rejected")
        prompt, chosen = encode_answer(self.tokenizer, row["prompt"], row["chosen"])
        rejected = encode_answer(self.tokenizer, row["prompt"], row["rejected"])[1]
        room = self.max_tokens - len(prompt)
        if room <= 0:
            self.dropped[f"prompts that fill max_tokens {self.max_tokens}"] += 1
            return None
        if max(len(chosen), len(rejected)) > room:
            self.cut[f"pairs of more than max_tokens {self.max_tokens}"] += 1
        if chosen[:room] == rejected[:room]:
            self.dropped["pairs of which both answers are the same"] += 1
            return None
        answers = [array("i", prompt + answer[:room]) for answer in (chosen, rejected)]
        return Pair(answers[0], answers[1], len(prompt), float(row.get("margin", 0.0)))

    def collate(self) -> Callable[..., Batch]:
        """Makes Pairs."""
        return partial(pairs_of, self.tokenizer.pad_token_id)


class Pair(NamedTuple):
    """One encoded row.

    Args:
        chosen: Token ids of the prompt and the better answer.
        rejected: Token ids of the prompt and the worse answer.
        num_prompt: Tokens of the prompt.
        margin: By how much the better answer should win.
    """

    chosen: array[int]
    rejected: array[int]
    num_prompt: int
    margin: float

    @property
    def fingerprint(self) -> int:
        """64 bits of the texts: the same wherever the pair stands, and no other pair's."""
        sizes = array("i", [self.num_prompt, len(self.chosen)])
        texts = sizes.tobytes() + self.chosen.tobytes() + self.rejected.tobytes()
        return int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), signed=True)


def pairs_of(pad: int, examples: list[Pair], **marks: Any) -> Pairs:
    """Pairs of one batch, all texts right-padded to the longest."""
    fields: dict[str, Any] = {}
    width = max(len(text) for pair in examples for text in (pair.chosen, pair.rejected))
    starts = torch.tensor([pair.num_prompt for pair in examples]).unsqueeze(1)
    for side, texts in (
        ("chosen", [pair.chosen for pair in examples]),
        ("rejected", [pair.rejected for pair in examples]),
    ):
        tokens, mask, lengths = pad_right(texts, pad, width)
        fields |= {side: tokens, f"{side}_mask": mask, f"{side}_lengths": lengths}
        fields[f"{side}_loss_mask"] = mask & (torch.arange(width) >= starts)
    fields["margin"] = torch.tensor([pair.margin for pair in examples])
    fields["fingerprints"] = [pair.fingerprint for pair in examples]
    return Pairs(**fields, **marks)

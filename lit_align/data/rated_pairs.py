"""Preference pairs of rated texts."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from lit_align.batches import Batch
from lit_align.data.base import TextDataModule
from lit_align.data.formats import (
    canonical_row,
    extract_prompt,
    finite_number,
    missing_columns_error,
)
from lit_align.data.loader import Loader
from lit_align.data.preferences import EncodedPair, collate_pairs
from lit_align.data.sources import Row
from lit_align.data.text import encode_response
from lit_align.errors import UserError


class RatedPairs(TextDataModule):
    """Pairs of two rated texts. The text with the higher rating is chosen.

    Reads `prompt` and `completion`, or `text` without a prompt. Responses are paired within their
    prompt, and texts without a prompt with each other. Evaluation holds out all responses of a
    prompt, or single texts, and pairs them with each other: no text is trained on and evaluated.
    The difference of the ratings is the pair's `margin`. Ratings of mixed sources must share one
    scale, because they are compared.

    Args:
        rating: Column with the rating, a number. Higher is better.
        min_difference: Least difference of the two ratings of a pair. Texts with equal ratings are
            never paired.
        pairs_per_text: Number of partners drawn for each text, by `seed`.
        max_tokens: Most tokens of prompt and text together. A longer text is cut and then has no
            stop token.
        **kwargs: Arguments of TextDataModule.

    Example:
        >>> data = RatedPairs("toy", tokenizer="toy")
        >>> texts = [data.encode({"text": "the plot", "rating": rating}) for rating in (1, 3)]
        >>> [text.rating for text in texts]
        [1.0, 3.0]
    """

    def __init__(
        self,
        *args: Any,
        rating: str = "rating",
        min_difference: float = 0.0,
        pairs_per_text: int = 1,
        max_tokens: int = 1024,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if min_difference < 0 or pairs_per_text < 1:
            raise UserError(
                "RatedPairs needs min_difference >= 0 and pairs_per_text >= 1, found "
                f"{min_difference} and {pairs_per_text}. Set --data.min_difference and "
                "--data.pairs_per_text."
            )
        self.rating = rating
        self.min_difference = min_difference
        self.pairs_per_text = pairs_per_text
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> RatedText | None:
        """Return a text with its prompt and rating, or None if it is dropped."""
        row = canonical_row(row)
        if self.rating not in row:
            raise missing_columns_error(row, f"{self.rating} (set by data.rating)")
        if "completion" in row:
            prompt, response = encode_response(
                self.tokenizer, extract_prompt(row), row["completion"]
            )
        elif "text" in row:
            prompt, response = encode_response(self.tokenizer, "", row["text"])
        else:
            raise missing_columns_error(row, "prompt and completion, or text")
        if len(prompt) >= self.max_tokens:
            self.dropped[f"prompts that fill max_tokens {self.max_tokens}"] += 1
            return None
        if len(prompt) + len(response) > self.max_tokens:
            self.truncated[f"texts of more than max_tokens {self.max_tokens}"] += 1
        rating = finite_number(row[self.rating], self.rating)
        ids = array("i", (prompt + response)[: self.max_tokens])
        return RatedText(ids, len(prompt), "completion" in row, rating)

    def group_key(self, example: RatedText) -> bytes:
        """Return the token ids of the prompt as bytes, or of a text without a prompt."""
        ids = example.ids[: example.num_prompt_tokens] if example.has_prompt else example.ids
        return ids.tobytes()

    def loader(self, examples: list[Any], batch_size: int, training: bool) -> Loader:
        """Return this rank's batches of pairs."""
        pairs = self.pairs(examples)
        kind = "training" if training else "evaluation"
        rank_zero_info(f"{kind}: {len(pairs)} pairs of {len(examples)} rated texts")
        if not pairs:
            raise UserError(
                f"no two of {len(examples)} texts of one prompt have ratings that differ by "
                f"min_difference {self.min_difference}. Set --data.min_difference."
            )
        return super().loader(pairs, batch_size, training)

    def pairs(self, texts: list[RatedText]) -> list[EncodedPair]:
        """Return `pairs_per_text` pairs for each text, without repeated pairs."""
        rng, found = random.Random(self.seed), []
        by_prompt: dict[bytes, list[RatedText]] = defaultdict(list)
        for text in texts:
            by_prompt[text.ids[: text.num_prompt_tokens].tobytes()].append(text)
        for group in by_prompt.values():
            group.sort(key=lambda text: text.rating)
            found += [
                make_pair(group[low], group[high]) for low, high in self.draw_pairs(group, rng)
            ]
        return [each for each in found if each.chosen != each.rejected]

    def draw_pairs(self, texts: list[RatedText], rng: random.Random) -> list[tuple[int, int]]:
        """Return positions (worse, better) in `texts`, which must be sorted by rating.

        Example:
            >>> data = RatedPairs("toy", min_difference=2)
            >>> texts = [RatedText(array("i"), 0, False, rating) for rating in (0.0, 1.0, 2.0)]
            >>> data.draw_pairs(texts, random.Random(0))
            [(0, 2)]
        """
        ratings = [text.rating for text in texts]
        drawn: dict[tuple[int, int], None] = {}
        for index, rating in enumerate(ratings):
            worse = min(
                bisect_right(ratings, rating - self.min_difference), bisect_left(ratings, rating)
            )
            better = max(
                bisect_left(ratings, rating + self.min_difference), bisect_right(ratings, rating)
            )
            # A partner is any text outside texts[worse:better]; index i >= worse means text
            # i + (better - worse).
            others = worse + len(texts) - better
            for choice in rng.sample(range(others), min(self.pairs_per_text, others)):
                other = choice if choice < worse else better + choice - worse
                drawn[min(index, other), max(index, other)] = None
        return list(drawn)

    def collate_fn(self) -> Callable[..., Batch]:
        """Return a function that makes a PreferenceBatch."""
        return partial(collate_pairs, self.tokenizer.pad_token_id)


class RatedText(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt and the text.
        num_prompt_tokens: Tokens before the text.
        has_prompt: True if the row has a prompt, not only the tokenizer's leading special tokens.
        rating: Rating of the text. Higher is better.
    """

    ids: array[int]
    num_prompt_tokens: int
    has_prompt: bool
    rating: float


def make_pair(worse: RatedText, better: RatedText) -> EncodedPair:
    """Return the pair of two texts that share a prompt, with the rating difference as margin.

    Example:
        >>> worse = RatedText(array("i", [5]), 0, False, 1.0)
        >>> better = RatedText(array("i", [6]), 0, False, 3.0)
        >>> make_pair(worse, better).margin
        2.0
    """
    return EncodedPair(
        better.ids, worse.ids, better.num_prompt_tokens, better.rating - worse.rating
    )

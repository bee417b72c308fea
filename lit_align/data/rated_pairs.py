"""Preference pairs from texts that each have a rating."""

from __future__ import annotations

import math
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
from lit_align.data.formats import canonical_row, extract_prompt, missing_columns_error
from lit_align.data.loader import Loader
from lit_align.data.preferences import EncodedPair, collate_pairs
from lit_align.data.sources import Row
from lit_align.data.text import encode_response
from lit_align.errors import UserError


class RatedPairs(TextDataModule):
    """Pairs of two rated texts, of which the better rated one is chosen.

    Reads `completion` and its `prompt`, or `text`, which has none. Only answers to the same
    prompt are paired; texts without a prompt are paired with any other. Evaluation sets aside
    whole prompts, and texts without a prompt one by one, and pairs them with one another: no text
    is both trained on and evaluated. The difference of the ratings is the pair's `margin`. Ratings
    of mixed sources are compared, so they need one scale.

    Args:
        rating: Column with the rating, a number that is higher for a better text.
        min_difference: Least difference of the two ratings of a pair; equal ones make no pair.
        pairs_per_text: Pairs that are drawn for each text, by `seed`.
        max_tokens: Where prompt and text together are cut, in tokens; a cut text has no stop.
        **kwargs: Those of TextDataModule.
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
                f"{min_difference} and {pairs_per_text}"
            )
        self.rating = rating
        self.min_difference = min_difference
        self.pairs_per_text = pairs_per_text
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> RatedText | None:
        """Token ids of a text with its prompt, and the rating."""
        row = canonical_row(row)
        if self.rating not in row:
            raise missing_columns_error(row, f"{self.rating}, which data.rating names")
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
        ids = array("i", (prompt + response)[: self.max_tokens])
        return RatedText(ids, len(prompt), "completion" in row, parse_rating(row[self.rating]))

    def group_key(self, example: RatedText) -> bytes:
        """The prompt, or the text where there is none."""
        ids = example.ids[: example.num_prompt_tokens] if example.has_prompt else example.ids
        return ids.tobytes()

    def loader(self, examples: list[Any], batch_size: int, training: bool) -> Loader:
        """This rank's batches of pairs."""
        pairs = self.pairs(examples)
        kind = "train" if training else "evaluate"
        rank_zero_info(f"{len(examples)} rated texts to {kind} on make {len(pairs)} pairs")
        if not pairs:
            raise UserError(
                f"no two of {len(examples)} texts of one prompt have ratings that differ by "
                f"data.min_difference {self.min_difference}"
            )
        return super().loader(pairs, batch_size, training)

    def pairs(self, texts: list[RatedText]) -> list[EncodedPair]:
        """`pairs_per_text` pairs for each text, none of them twice."""
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
        """Positions (worse, better) in `texts`, which are sorted by rating."""
        ratings = [text.rating for text in texts]
        drawn: dict[tuple[int, int], None] = {}
        for index, rating in enumerate(ratings):
            worse = min(
                bisect_right(ratings, rating - self.min_difference), bisect_left(ratings, rating)
            )
            better = max(
                bisect_left(ratings, rating + self.min_difference), bisect_right(ratings, rating)
            )
            others = worse + len(texts) - better
            for choice in rng.sample(range(others), min(self.pairs_per_text, others)):
                other = choice if choice < worse else better + choice - worse
                drawn[min(index, other), max(index, other)] = None
        return list(drawn)

    def collate_fn(self) -> Callable[..., Batch]:
        """Makes PreferenceBatch."""
        return partial(collate_pairs, self.tokenizer.pad_token_id)


class RatedText(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt and the text.
        num_prompt_tokens: Tokens before the text.
        has_prompt: Whether the row has a prompt, beyond what its tokenizer puts in front.
        rating: Higher for a better text.
    """

    ids: array[int]
    num_prompt_tokens: int
    has_prompt: bool
    rating: float


def make_pair(worse: RatedText, better: RatedText) -> EncodedPair:
    """Both texts, which have one prompt."""
    return EncodedPair(
        better.ids, worse.ids, better.num_prompt_tokens, better.rating - worse.rating
    )


def parse_rating(value: Any) -> float:
    """A rating as a number, also from text."""
    try:
        rating = float(value)
    except (TypeError, ValueError):
        rating = math.nan
    if not math.isfinite(rating):
        raise UserError(f"the rating '{value}' is no number")
    return rating

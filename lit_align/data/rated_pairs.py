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
from lit_align.data.base import TextData
from lit_align.data.formats import canonical, missing, prompt_of
from lit_align.data.loader import Loader
from lit_align.data.preferences import Pair, pairs_of
from lit_align.data.sources import Row
from lit_align.data.text import encode_answer


class RatedPairs(TextData):
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
        **kwargs: Those of TextData.
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
            raise ValueError(
                "RatedPairs needs min_difference >= 0 and pairs_per_text >= 1, found "
                f"{min_difference} and {pairs_per_text}"
            )
        self.rating = rating
        self.min_difference = min_difference
        self.pairs_per_text = pairs_per_text
        self.max_tokens = max_tokens

    def encode(self, row: Row) -> Rated | None:
        """Token ids of a text with its prompt, and the rating."""
        row = canonical(row)
        if self.rating not in row:
            raise missing(row, f"{self.rating}, which data.rating names")
        if "completion" in row:
            prompt, answer = encode_answer(self.tokenizer, prompt_of(row), row["completion"])
        elif "text" in row:
            prompt, answer = encode_answer(self.tokenizer, "", row["text"])
        else:
            raise missing(row, "prompt and completion, or text")
        if len(prompt) >= self.max_tokens:
            self.dropped[f"prompts that fill max_tokens {self.max_tokens}"] += 1
            return None
        if len(prompt) + len(answer) > self.max_tokens:
            self.cut[f"texts of more than max_tokens {self.max_tokens}"] += 1
        ids = array("i", (prompt + answer)[: self.max_tokens])
        return Rated(ids, len(prompt), "completion" in row, number(row[self.rating]))

    def unit(self, example: Rated) -> bytes:
        """The prompt, or the text where there is none."""
        ids = example.ids[: example.num_prompt] if example.has_prompt else example.ids
        return ids.tobytes()

    def loader(self, examples: list[Any], batch_size: int, training: bool) -> Loader:
        """This rank's batches of pairs."""
        pairs = self.pairs(examples)
        kind = "train" if training else "evaluate"
        rank_zero_info(f"{len(examples)} rated texts to {kind} on make {len(pairs)} pairs")
        if not pairs:
            raise ValueError(
                f"no two of {len(examples)} texts of one prompt have ratings that differ by "
                f"data.min_difference {self.min_difference}"
            )
        return super().loader(pairs, batch_size, training)

    def pairs(self, texts: list[Rated]) -> list[Pair]:
        """`pairs_per_text` pairs for each text, none of them twice."""
        rng, found = random.Random(self.seed), []
        by_prompt: dict[bytes, list[Rated]] = defaultdict(list)
        for text in texts:
            by_prompt[text.ids[: text.num_prompt].tobytes()].append(text)
        for group in by_prompt.values():
            group.sort(key=lambda text: text.rating)
            found += [pair(group[low], group[high]) for low, high in self.draw(group, rng)]
        return [each for each in found if each.chosen != each.rejected]

    def draw(self, texts: list[Rated], rng: random.Random) -> list[tuple[int, int]]:
        """Positions (worse, better) in `texts`, which are sorted by rating."""
        ratings = [text.rating for text in texts]
        drawn: dict[tuple[int, int], None] = {}
        for place, rating in enumerate(ratings):
            worse = min(
                bisect_right(ratings, rating - self.min_difference), bisect_left(ratings, rating)
            )
            better = max(
                bisect_left(ratings, rating + self.min_difference), bisect_right(ratings, rating)
            )
            others = worse + len(texts) - better
            for choice in rng.sample(range(others), min(self.pairs_per_text, others)):
                other = choice if choice < worse else better + choice - worse
                drawn[min(place, other), max(place, other)] = None
        return list(drawn)

    def collate(self) -> Callable[..., Batch]:
        """Makes Pairs."""
        return partial(pairs_of, self.tokenizer.pad_token_id)


class Rated(NamedTuple):
    """One encoded row.

    Args:
        ids: Token ids of the prompt and the text.
        num_prompt: Tokens before the text.
        has_prompt: Whether the row has a prompt, beyond what its tokenizer puts in front.
        rating: Higher for a better text.
    """

    ids: array[int]
    num_prompt: int
    has_prompt: bool
    rating: float


def pair(worse: Rated, better: Rated) -> Pair:
    """Both texts, which have one prompt."""
    return Pair(better.ids, worse.ids, better.num_prompt, better.rating - worse.rating)


def number(value: Any) -> float:
    """A rating as a number, also from text."""
    try:
        rating = float(value)
    except (TypeError, ValueError):
        rating = math.nan
    if not math.isfinite(rating):
        raise ValueError(f"the rating '{value}' is no number")
    return rating

"""Toy data: short film reviews from a small grammar, their sentiment and their tokenizer.

    prompt      review of the silent river, a recent drama, on its music:
    completion  truly haunting, but the plot feels thin. overall a good film.

A review has 2 to 4 clauses and an optional verdict. The first clause is an opinion on the aspect
that the prompt names. Each other clause names its aspect and has an opinion word of that aspect.
The `sentiment` of both reviews of a pair decides which is chosen, apart from noise.
"""

from __future__ import annotations

import math
import random
import re
from itertools import product
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_align.errors import UserError

# opinion words by aspect and polarity, from 2 (praise) to -2
OPINIONS = {
    "acting": {
        2: "brilliant superb magnetic luminous",
        1: "natural lively",
        0: "restrained theatrical",
        -1: "wooden stiff",
        -2: "dreadful lifeless embarrassing",
    },
    "plot": {
        2: "gripping ingenious thrilling masterful",
        1: "clever engaging",
        0: "linear episodic",
        -1: "thin muddled",
        -2: "absurd incoherent pointless",
    },
    "music": {
        2: "haunting glorious enchanting unforgettable",
        1: "catchy gentle",
        0: "electronic orchestral",
        -1: "intrusive repetitive",
        -2: "grating unbearable hideous",
    },
    "photography": {
        2: "breathtaking gorgeous stunning dazzling",
        1: "elegant inventive",
        0: "grainy monochrome",
        -1: "murky drab",
        -2: "ugly amateurish hopeless",
    },
    "ending": {
        2: "devastating perfect triumphant sublime",
        1: "moving hopeful",
        0: "open abrupt",
        -1: "rushed forced",
        -2: "insulting ridiculous infuriating",
    },
}
ASPECTS = list(OPINIONS)
VERDICT_WORDS = {
    2: "wonderful magnificent splendid",
    1: "good charming",
    0: "middling curious",
    -1: "weak dull",
    -2: "terrible worthless miserable",
}
INTENSITIES = {
    "slightly": 0.5,
    "rather": 0.75,
    "very": 1.5,
    "truly": 1.5,
    "utterly": 2.0,
    "absolutely": 2.0,
}
VERBS = ["is", "feels", "seems"]
CONTRASTS = ["but", "yet", "though"]
ADDITIONS = ["and", "while", "plus"]
GENRES = ["drama", "comedy", "thriller", "western", "romance", "mystery"]
ERAS = ["recent", "classic", "forgotten", "french"]
ADJECTIVES = ["silent", "golden", "broken", "hidden", "crimson", "frozen", "winding", "lonely"]
NOUNS = ["river", "garden", "city", "letter", "harbour", "station", "island", "winter"]
FUNCTION_WORDS = ["review", "of", "the", "a", "on", "its", ":", ",", ".", "overall", "film"]
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}
NUM_TRAIN, NUM_TEST = 6000, 500

POLARITY = {  # by opinion word and verdict
    word: polarity
    for words in [*OPINIONS.values(), VERDICT_WORDS]
    for polarity, group in words.items()
    for word in group.split()
}

ToyRow = dict[str, str]


def toy_rows(split: str = "train", seed: int = 0, max_rows: int | None = None) -> list[ToyRow]:
    """Return rows with `prompt`, `completion`, `chosen` and `rejected`, with distinct prompts.

    Args:
        split: "train" (6,000 rows) or "test" (500 rows with other prompts).
        seed: Seed of the data set.
        max_rows: Most rows, from the first on. Default: all.

    Example:
        >>> (row,) = toy_rows("test", max_rows=1)
        >>> is_grammatical(row["prompt"], row["completion"])
        True
    """
    if split not in ("train", "test"):
        raise UserError(
            f"the toy data have no split '{split}', found train and test. Set --data.split."
        )
    rng = random.Random(seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    first, count = (0, NUM_TEST) if split == "test" else (NUM_TEST, NUM_TRAIN)
    rng = random.Random(f"{seed} {split}")
    return [toy_row(prompt, rng) for prompt in prompts[first : first + count][:max_rows]]


def all_prompts() -> list[str]:
    """Return all prompts of the grammar, each of 12 to 14 words and punctuation marks.

    Example:
        >>> len(all_prompts())  # 72 titles x 30 kinds of film x 5 aspects
        10800
    """
    titles = [*NOUNS, *(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS))]
    kinds = [*GENRES, *(f"{era} {genre}" for era, genre in product(ERAS, GENRES))]
    return [
        f"review of the {title}, a {kind}, on its {aspect}:"
        for title, kind, aspect in product(titles, kinds, ASPECTS)
    ]


def toy_row(prompt: str, rng: random.Random) -> ToyRow:
    """Return a completion and a pair of reviews of a prompt.

    The chosen one is better with probability sigmoid(3 x difference of the sentiments).

    Example:
        >>> sorted(toy_row("review of the river, a drama, on its plot:", random.Random(0)))
        ['chosen', 'completion', 'prompt', 'rejected']
    """
    completion, one, other = (write_review(prompt, rng) for _ in range(3))
    while other == one:
        other = write_review(prompt, rng)
    difference = sentiment(one) - sentiment(other)
    if rng.random() > 1 / (1 + math.exp(-3 * difference)):
        one, other = other, one
    return {"prompt": prompt, "completion": completion, "chosen": one, "rejected": other}


def write_review(prompt: str, rng: random.Random) -> str:
    """Return a random review for a prompt.

    Example:
        >>> prompt = "review of the river, a drama, on its plot:"
        >>> is_grammatical(prompt, write_review(prompt, random.Random(0)))
        True
    """
    mood, aspect = rng.gauss(0, 0.7), prompted_aspect(prompt)
    text, before = "", 0
    for number in range(rng.choice([2, 3, 4])):
        polarity = sample_polarity(mood, rng)
        if number:
            aspect = rng.choice([other for other in ASPECTS if other != aspect])
            conjunction = rng.choice(CONTRASTS if polarity * before < 0 else ADDITIONS)
            text += f", {conjunction} the {aspect} {rng.choice(VERBS)} "
        text += rng.choice(list(INTENSITIES)) + " " if rng.random() < 0.5 else ""
        text += rng.choice(OPINIONS[aspect][polarity].split())
        before = polarity
    if rng.random() < 0.5:
        text += f". overall a {rng.choice(VERDICT_WORDS[sample_polarity(mood, rng)].split())} film"
    return text + "."


def sample_polarity(mood: float, rng: random.Random) -> int:
    """Return a random polarity from -2 to 2 around the mood of the review.

    Example:
        >>> sample_polarity(100.0, random.Random(0))
        2
    """
    return max(-2, min(2, round(rng.gauss(mood, 1.2))))


def prompted_aspect(prompt: str) -> str:
    """Return the aspect that a prompt names, or "" for any other text.

    Example:
        >>> prompted_aspect("review of the river, a drama, on its plot:")
        'plot'
    """
    adjectives, eras, aspects = "|".join(ADJECTIVES), "|".join(ERAS), "|".join(ASPECTS)
    title = rf"(?:(?:{adjectives}) )?(?:{'|'.join(NOUNS)})"
    kind = rf"(?:(?:{eras}) )?(?:{'|'.join(GENRES)})"
    found = re.fullmatch(rf"review of the {title}, a {kind}, on its ({aspects}):", prompt.strip())
    return found[1] if found else ""


def is_grammatical(prompt: str, completion: str) -> bool:
    """Return True if the grammar can write the completion for this prompt.

    Example:
        >>> prompt = "review of the river, a drama, on its plot:"
        >>> [is_grammatical(prompt, text) for text in ("thin, and the ending is open.", "thin.")]
        [True, False]
    """
    verdicts = "|".join(word for group in VERDICT_WORDS.values() for word in group.split())
    conjunction = rf", (?:{'|'.join(CONTRASTS + ADDITIONS)}) "
    review = re.fullmatch(rf"(.+?)(?:\. overall a (?:{verdicts}) film)?\.", completion.strip())
    first = f"the {prompted_aspect(prompt)} {VERBS[0]} "
    clauses = re.split(conjunction, first + review[1]) if review else []
    return 2 <= len(clauses) <= 4 and all(is_clause(clause) for clause in clauses)


def is_clause(text: str) -> bool:
    """Return True for a clause of the grammar.

    Example:
        >>> is_clause("the plot feels rather thin"), is_clause("the plot feels rather wooden")
        (True, False)
    """
    intensities, verbs = "|".join(INTENSITIES), "|".join(VERBS)
    found = re.fullmatch(rf"the (\S+) (?:{verbs}) (?:(?:{intensities}) )?(\S+)", text)
    words = OPINIONS[found[1]].values() if found and found[1] in OPINIONS else []
    return found is not None and found[2] in " ".join(words).split()


def sentiment(completion: str) -> float:
    """Return the mean of polarity x intensity over the opinion words, from -4 to 4.

    A text without opinion words has sentiment 0.

    Example:
        >>> sentiment("utterly haunting, but the plot feels thin.")  # (2 * 2 - 1) / 2
        1.5
    """
    words = re.findall(r"[\w-]+", completion)
    values = [
        POLARITY[word] * INTENSITIES.get(before, 1.0)
        for before, word in zip(["", *words], words, strict=False)
        if word in POLARITY
    ]
    return sum(values) / len(values) if values else 0.0


def sentiment_reward(completions: list[str], **columns: Any) -> list[float]:
    """Return the sentiment of each completion, as a reward function in TRL's form.

    Args:
        completions: N responses.
        **columns: Other columns of the data set, unused.

    Example:
        >>> sentiment_reward(["grating.", "perfect."])
        [-2.0, 2.0]
    """
    return [sentiment(completion) for completion in completions]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word or punctuation mark and a leading <s>.

    Example:
        >>> tokenizer = toy_tokenizer()
        >>> tokenizer.decode(tokenizer("the plot is thin.")["input_ids"], skip_special_tokens=True)
        'the plot is thin.'
    """
    words = [
        *SPECIAL_TOKENS.values(),
        *FUNCTION_WORDS,
        *ASPECTS,
        *INTENSITIES,
        *VERBS,
        *CONTRASTS,
        *ADDITIONS,
    ]
    words += [*GENRES, *ERAS, *ADJECTIVES, *NOUNS, *POLARITY]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    signs = pre_tokenizers.Split(Regex("[.,:]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), signs])
    front = [("<s>", vocabulary["<s>"])]
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=front)
    tight = [decoders.Replace(f" {sign}", sign) for sign in ".,:"]
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), *tight])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

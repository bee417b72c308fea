"""Short film reviews written by a small grammar: data that need no download, and their judge.

    prompt      review of the silent river, a recent drama, on its music:
    completion  truly haunting, but the plot feels thin. overall a good film.

The first of 2 to 4 clauses is an opinion of what the prompt asks for, each other one names its
aspect and has an opinion that suits it; the verdict is optional. How good the film was is the
latent `sentiment`, which decides the preference pairs but for some noise.
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

# the opinion words of each aspect, from 2 (praise) to -2
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

POLARITY = {  # of each opinion word and verdict
    word: polarity
    for words in [*OPINIONS.values(), VERDICT_WORDS]
    for polarity, group in words.items()
    for word in group.split()
}

ToyRow = dict[str, str]


def toy_rows(split: str = "train", seed: int = 0, max_rows: int | None = None) -> list[ToyRow]:
    """Rows with `prompt`, `completion`, `chosen` and `rejected`; no prompt comes twice.

    Args:
        split: train (6,000 rows) or test (500 rows with prompts that train has not).
        seed: Another seed is another data set.
        max_rows: At most so many rows are written, the first ones.
    """
    if split not in ("train", "test"):
        raise UserError(f"the toy data have no split '{split}'; there are train and test")
    rng = random.Random(seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    first, count = (0, NUM_TEST) if split == "test" else (NUM_TEST, NUM_TRAIN)
    rng = random.Random(f"{seed} {split}")
    return [toy_row(prompt, rng) for prompt in prompts[first : first + count][:max_rows]]


def all_prompts() -> list[str]:
    """Every prompt of the grammar, of 12 to 14 words and signs."""
    titles = [*NOUNS, *(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS))]
    kinds = [*GENRES, *(f"{era} {genre}" for era, genre in product(ERAS, GENRES))]
    return [
        f"review of the {title}, a {kind}, on its {aspect}:"
        for title, kind, aspect in product(titles, kinds, ASPECTS)
    ]


def toy_row(prompt: str, rng: random.Random) -> ToyRow:
    """A completion and a pair; the better of the pair is chosen with sigmoid(3 x difference)."""
    completion, one, other = (write_review(prompt, rng) for _ in range(3))
    while other == one:
        other = write_review(prompt, rng)
    difference = sentiment(one) - sentiment(other)
    if rng.random() > 1 / (1 + math.exp(-3 * difference)):
        one, other = other, one
    return {"prompt": prompt, "completion": completion, "chosen": one, "rejected": other}


def write_review(prompt: str, rng: random.Random) -> str:
    """One review of the prompted film."""
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
    """A polarity from -2 to 2 around the mood of the review."""
    return max(-2, min(2, round(rng.gauss(mood, 1.2))))


def prompted_aspect(prompt: str) -> str:
    """The aspect that a prompt asks for; empty for a text that is no prompt."""
    adjectives, eras, aspects = "|".join(ADJECTIVES), "|".join(ERAS), "|".join(ASPECTS)
    title = rf"(?:(?:{adjectives}) )?(?:{'|'.join(NOUNS)})"
    kind = rf"(?:(?:{eras}) )?(?:{'|'.join(GENRES)})"
    found = re.fullmatch(rf"review of the {title}, a {kind}, on its ({aspects}):", prompt.strip())
    return found[1] if found else ""


def is_grammatical(prompt: str, completion: str) -> bool:
    """Whether the completion is a review that the grammar can write for this prompt."""
    verdicts = "|".join(word for group in VERDICT_WORDS.values() for word in group.split())
    conjunction = rf", (?:{'|'.join(CONTRASTS + ADDITIONS)}) "
    review = re.fullmatch(rf"(.+?)(?:\. overall a (?:{verdicts}) film)?\.", completion.strip())
    first = f"the {prompted_aspect(prompt)} {VERBS[0]} "
    clauses = re.split(conjunction, first + review[1]) if review else []
    return 2 <= len(clauses) <= 4 and all(is_clause(clause) for clause in clauses)


def is_clause(text: str) -> bool:
    """Whether the text is such as `the plot feels rather thin`."""
    intensities, verbs = "|".join(INTENSITIES), "|".join(VERBS)
    found = re.fullmatch(rf"the (\S+) (?:{verbs}) (?:(?:{intensities}) )?(\S+)", text)
    words = OPINIONS[found[1]].values() if found and found[1] in OPINIONS else []
    return found is not None and found[2] in " ".join(words).split()


def sentiment(completion: str) -> float:
    """Mean over its opinion words of polarity x intensity, from -4 to 4; 0 without any."""
    words = re.findall(r"[\w-]+", completion)
    values = [
        POLARITY[word] * INTENSITIES.get(before, 1.0)
        for before, word in zip(["", *words], words, strict=False)
        if word in POLARITY
    ]
    return sum(values) / len(values) if values else 0.0


def sentiment_reward(completions: list[str], **columns: Any) -> list[float]:
    """The sentiment of each completion, with the signature of TRL's reward functions."""
    return [sentiment(completion) for completion in completions]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and sign; <s> in front; decoding gives the text back."""
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

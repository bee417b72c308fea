"""Rewards that need no model: true answers, patterns, lengths, words."""

from __future__ import annotations

import itertools
import math
import re
import string
from abc import abstractmethod
from decimal import Decimal
from pathlib import Path

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.rewards.base import RewardFunction, completion_texts, dataset_column, last_turn

NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])[-\u2212])?"  # not the minus of 5-3
    r"(?:\$(?P<dollars_minus>-)?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


class AnswerRule(RewardFunction):
    """Compares the completion with a true answer; a row without one (None) is not scored.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def __init__(self, column: str = "answer"):
        self.column = column

    @abstractmethod
    def compare(self, completion: str, answer: str) -> float | None:
        """The score of one completion.

        Args:
            completion: What the policy said.
            answer: What it should have said.
        """

    def __call__(self, batch: Experience) -> list[float | None]:
        """[N] scores."""
        answers = dataset_column(batch, self.column)
        return [
            None if answer is None else self.compare(completion, answer_as_text(answer))
            for completion, answer in zip(completion_texts(batch), answers, strict=True)
        ]


class ExactAnswer(AnswerRule):
    """1 if the completion is the true answer, else 0; runs of white space count as one space.

    Args:
        column: Column of the data set that holds the true answer.
        extract: Regular expression that finds the answer within both texts: its last match, or
            that match's first group. A completion without a match scores 0. Default: all of it.
    """

    def __init__(self, column: str = "answer", extract: str | None = None):
        super().__init__(column)
        self.extract = compile_pattern(extract) if extract is not None else None

    def compare(self, completion: str, answer: str) -> float:
        """1 if both texts hold the same answer."""
        predicted = self.find(completion)
        expected = self.find(answer)
        return float(
            predicted is not None
            and predicted == (collapse_whitespace(answer) if expected is None else expected)
        )

    def find(self, text: str) -> str | None:
        """The answer within a text, None if it is not there."""
        if self.extract is None:
            return collapse_whitespace(text)
        matches = list(self.extract.finditer(text))
        if not matches:
            return None
        return collapse_whitespace(matches[-1][min(1, self.extract.groups)] or "")


class NumericAnswer(AnswerRule):
    """1 if the completion's number equals the true answer's, else 0: $1,234.50 is 1234.5.

    In both texts it is the number after the last `####`, as in GSM8K, else the last number. A row
    whose true answer holds no number is not scored.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def compare(self, completion: str, answer: str) -> float | None:
        """1 if both texts hold the same number."""
        expected = final_number(answer)
        return None if expected is None else float(final_number(completion) == expected)


class PrefixAnswer(AnswerRule):
    """Characters right before the first mistake / (length of the true answer + 1).

    The 1 stands for the stop, which earns nothing: the best score is just below 1.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def compare(self, completion: str, answer: str) -> float:
        """The share of the answer that is right."""
        return correct_prefix_fraction(completion, answer)


class DigitSequence(RewardFunction):
    """The digit completion task, scored like `PrefixAnswer`.

    The prompt `a,b:M,N` asks for the N numbers that follow a and b in equal steps, modulo M,
    joined by commas: `9,10:20,2` for `11,12`.
    """

    def __call__(self, batch: Experience) -> list[float | None]:
        """[N] scores."""
        prompts = [last_turn(prompt) for prompt in dataset_column(batch, "prompt")]
        return [
            correct_prefix_fraction(completion, self.answer(prompt))
            for prompt, completion in zip(prompts, completion_texts(batch), strict=True)
        ]

    def answer(self, prompt: str) -> str:
        """The numbers asked for."""
        parts = re.fullmatch(r"(\d+),(\d+):([1-9]\d*),(\d+)", prompt.strip())
        if parts is None:
            raise UserError("the prompt is not of the form a,b:M,N with M above 0")
        first, second, modulus, number = map(int, parts.groups())
        steps = range(1, number + 1)
        return ",".join(str((second + (second - first) * step) % modulus) for step in steps)


class RegexMatch(RewardFunction):
    """1 if a regular expression matches somewhere in the completion, else 0.

    Args:
        pattern: Regular expression; `^...$` for the whole completion, `(?s)` to cross lines.
    """

    def __init__(self, pattern: str):
        self.pattern = compile_pattern(pattern)

    def __call__(self, batch: Experience) -> list[float | None]:
        """[N] scores."""
        return [float(bool(self.pattern.search(text))) for text in completion_texts(batch)]


class Length(RewardFunction):
    """How close the response is to a wanted length: -|tokens - target| / target, at best 0.

    Args:
        target: Wanted length of a response in tokens, its stop included.
    """

    def __init__(self, target: int):
        if target < 1:
            raise UserError(f"the target length must be at least 1 token, not {target}")
        self.target = target

    def __call__(self, batch: Experience) -> list[float | None]:
        """[N] scores."""
        return [-abs(length - self.target) / self.target for length in batch.response_lengths]


class Lexicon(RewardFunction):
    """Sentiment by words: the sum x of their valences as x / sqrt(x^2 + 15), between -1 and 1.

    Words are compared in lower case, without punctuation around them. Negations and emphasis are
    not understood.

    Args:
        path: Text file with one `word<TAB>valence` per line, such as VADER's; more is ignored.
    """

    def __init__(self, path: str):
        self.valences: dict[str, float] = {}
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path}: no such lexicon file")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                word, valence = line.split("\t")[:2]
                self.valences[word.strip()] = float(valence)
            except ValueError:
                raise UserError(f"{path}, line {number}: not `word<TAB>valence`") from None

    def __call__(self, batch: Experience) -> list[float | None]:
        """[N] scores."""
        return [self.sentiment(text) for text in completion_texts(batch)]

    def sentiment(self, text: str) -> float:
        """The score of one text."""
        total = sum(self.valence(word) for word in text.lower().split())
        return total / math.sqrt(total**2 + 15)

    def valence(self, word: str) -> float:
        """Of a word or an emoticon; 0 for one that the lexicon does not know."""
        plain = word.strip(string.punctuation)
        return self.valences.get(word, self.valences.get(plain, 0.0))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression, or one sentence about what is wrong with it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{pattern}' is not a regular expression: {error}") from None


def collapse_whitespace(text: str) -> str:
    """A text without white space around it, and with single spaces within."""
    return " ".join(text.split())


def answer_as_text(answer: object) -> str:
    """A true answer as text: numbers are written out, conversations give their last turn."""
    return last_turn(answer) if isinstance(answer, list) else str(answer)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number; None if there is none."""
    body, marker, marked = text.rpartition("####")
    found = NUMBER.search(marked) if marker else None
    if found is None:
        matches = list(NUMBER.finditer(body or marked))
        if not matches:
            return None
        found = matches[-1]
    number = Decimal(found["digits"].replace(",", ""))
    return -number if found["minus"] or found["dollars_minus"] else number


def correct_prefix_fraction(completion: str, answer: str) -> float:
    """Characters that agree before the first mistake / (length of the answer + 1).

    Args:
        completion: What was said.
        answer: What should have been said.
    """
    pairs = zip(completion, answer, strict=False)
    right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return right / (len(answer) + 1)

"""Rewards without a model: true answers, patterns, lengths and word lists."""

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
    """Comparison of the completion with the true answer.

    A row without a true answer (None) gets None.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def __init__(self, column: str = "answer"):
        self.column = column

    @abstractmethod
    def compare(self, completion: str, answer: str) -> float | None:
        """Return the score of one completion, or None if the rule does not apply.

        Args:
            completion: Text that the policy generated.
            answer: The true answer.
        """

    def __call__(self, batch: Experience) -> list[float | None]:
        """Return the N scores."""
        answers = dataset_column(batch, self.column)
        return [
            None if answer is None else self.compare(completion, answer_as_text(answer))
            for completion, answer in zip(completion_texts(batch), answers, strict=True)
        ]


class ExactAnswer(AnswerRule):
    """1 if the completion equals the true answer, else 0. White space counts as one space.

    Args:
        column: Column of the data set that holds the true answer.
        extract: Regular expression that finds the answer in both texts. The answer is the last
            match, or its first group. A completion without a match scores 0. Default: the
            whole text.
    """

    def __init__(self, column: str = "answer", extract: str | None = None):
        super().__init__(column)
        self.extract = compile_pattern("extract", extract) if extract is not None else None

    def compare(self, completion: str, answer: str) -> float:
        """Return 1 if both texts have the same answer, else 0."""
        predicted = self.find(completion)
        expected = self.find(answer)  # None if the column has the plain answer
        return float(
            predicted is not None
            and predicted == (collapse_whitespace(answer) if expected is None else expected)
        )

    def find(self, text: str) -> str | None:
        """Return the answer in a text, or None without a match."""
        if self.extract is None:
            return collapse_whitespace(text)
        matches = list(self.extract.finditer(text))
        if not matches:
            return None
        return collapse_whitespace(matches[-1][min(1, self.extract.groups)] or "")


class NumericAnswer(AnswerRule):
    """1 if the completion's number equals that of the true answer, else 0.

    The number of a text is the one after the last `####`, as in GSM8K, else the last one.
    $1,234.50 is 1234.5. A row without a number in the true answer has no score.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def compare(self, completion: str, answer: str) -> float | None:
        """Return 1 if both texts have the same number, else 0."""
        expected = final_number(answer)
        return None if expected is None else float(final_number(completion) == expected)


class PrefixAnswer(AnswerRule):
    """Correct characters before the first mistake / (length of the true answer + 1).

    The 1 is the stop token, which gives no score. The best score is therefore just below 1.

    Args:
        column: Column of the data set that holds the true answer.
    """

    def compare(self, completion: str, answer: str) -> float:
        """Return the fraction of the answer that is correct."""
        return correct_prefix_fraction(completion, answer)


class DigitSequence(RewardFunction):
    """Digit completion task, scored like `PrefixAnswer`.

    The prompt is `a,b:M,N`. The true answer is the N numbers after a and b in equal steps, modulo
    M, joined by commas. For `9,10:20,2` it is `11,12`.

    Example:
        >>> DigitSequence().answer("8,3:9,4")  # steps of -5, modulo 9
        '7,2,6,1'
    """

    def __call__(self, batch: Experience) -> list[float | None]:
        """Return the N scores."""
        prompts = [last_turn(prompt) for prompt in dataset_column(batch, "prompt")]
        return [
            correct_prefix_fraction(completion, self.answer(prompt))
            for prompt, completion in zip(prompts, completion_texts(batch), strict=True)
        ]

    def answer(self, prompt: str) -> str:
        """Return the true answer to a prompt.

        Args:
            prompt: Text of the form a,b:M,N.
        """
        parts = re.fullmatch(r"(\d+),(\d+):([1-9]\d*),(\d+)", prompt.strip())
        if parts is None:
            raise UserError(
                f"DigitSequence needs prompts of the form a,b:M,N with M above 0, found "
                f"'{prompt.strip()}'. Set --data.path."
            )
        first, second, modulus, number = map(int, parts.groups())
        steps = range(1, number + 1)
        return ",".join(str((second + (second - first) * step) % modulus) for step in steps)


class RegexMatch(RewardFunction):
    """1 if a regular expression matches somewhere in the completion, else 0.

    Args:
        pattern: Regular expression. `^...$` matches the whole completion, and with `(?s)` a dot
            matches line breaks.
    """

    def __init__(self, pattern: str):
        self.pattern = compile_pattern("pattern", pattern)

    def __call__(self, batch: Experience) -> list[float | None]:
        """Return the N scores."""
        return [float(bool(self.pattern.search(text))) for text in completion_texts(batch)]


class Length(RewardFunction):
    """Negative distance to a target length: -|tokens - target| / target, at best 0.

    Args:
        target: Target length of a response in tokens, stop token included.
    """

    def __init__(self, target: int):
        if target < 1:
            raise UserError(
                f"target must be at least 1 token, found {target}. Set --reward.functions.target."
            )
        self.target = target

    def __call__(self, batch: Experience) -> list[float | None]:
        """Return the N scores."""
        return [-abs(length - self.target) / self.target for length in batch.response_lengths]


class Lexicon(RewardFunction):
    """Sentiment of the words: x / sqrt(x^2 + 15) for the sum x of their valences, in (-1, 1).

    Words are compared in lower case, without punctuation around them. Negation and emphasis have
    no effect.

    Args:
        path: Text file with one `word<TAB>valence` per line, such as that of VADER. Further
            columns are ignored.
    """

    def __init__(self, path: str):
        self.valences: dict[str, float] = {}
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path}: no such lexicon file. Set --reward.functions.path.")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                word, valence = line.split("\t")[:2]
                self.valences[word.strip()] = float(valence)
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: expected `word<TAB>valence`, found '{line.strip()}'. "
                    f"Correct or remove the line."
                ) from None

    def __call__(self, batch: Experience) -> list[float | None]:
        """Return the N scores."""
        return [self.sentiment(text) for text in completion_texts(batch)]

    def sentiment(self, text: str) -> float:
        """Return the score of one text."""
        total = sum(self.valence(word) for word in text.lower().split())
        return total / math.sqrt(total**2 + 15)

    def valence(self, word: str) -> float:
        """Return the valence of a word or an emoticon, 0 if it is not in the lexicon."""
        plain = word.strip(string.punctuation)
        return self.valences.get(word, self.valences.get(plain, 0.0))


def compile_pattern(setting: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression of a setting.

    Args:
        setting: Name of the setting, for the message.
        pattern: The regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{setting} '{pattern}' is not a regular expression: {error}. Set "
            f"--reward.functions.{setting}."
        ) from None


def collapse_whitespace(text: str) -> str:
    """Return a text without white space around it, and with single spaces inside.

    Example:
        >>> collapse_whitespace("  New   York ")
        'New York'
    """
    return " ".join(text.split())


def answer_as_text(answer: object) -> str:
    """Return a true answer as text: a number in digits, or the last turn of a conversation."""
    return last_turn(answer) if isinstance(answer, list) else str(answer)


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, else the last number, else None.

    Example:
        >>> final_number("3 * 4 = 12, so #### 1,012"), final_number("no idea")
        (Decimal('1012'), None)
    """
    body, marker, marked = text.rpartition("####")
    found = NUMBER.search(marked) if marker else None
    if found is None:
        matches = list(NUMBER.finditer(body or marked))
        if not matches:
            return None
        found = matches[-1]
    # Decimal compares all digits. As floats, different long numbers would round to equal ones.
    number = Decimal(found["digits"].replace(",", ""))
    return -number if found["minus"] or found["dollars_minus"] else number


def correct_prefix_fraction(completion: str, answer: str) -> float:
    """Return the correct characters before the first mistake / (length of the answer + 1).

    Args:
        completion: Text that the policy generated.
        answer: The true answer.

    Example:
        >>> correct_prefix_fraction("abd", "abc")
        0.5
    """
    pairs = zip(completion, answer, strict=False)
    right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return right / (len(answer) + 1)

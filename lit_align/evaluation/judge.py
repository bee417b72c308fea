"""A command that says which of two answers is better: a script, a model behind an API, a person."""

import json
import shlex
import subprocess
from collections.abc import Sequence

from lit_align.errors import UserError
from lit_align.evaluation.statistics import ResponseRows
from lit_align.runs.run_folder import conversation_text

VERDICT_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def judge_pairs(command: str, rows: ResponseRows, others: ResponseRows) -> list[float]:
    """[N] 1 where an answer is found better than the other to the same prompt, 1/2 for a tie.

    The command runs once. It reads a JSON object per line, with `prompt`, `a` and `b`, and prints a
    line for each: a, b or tie. Every pair is asked in both orders and counts as their mean, so that
    a judge who prefers a place says nothing.

    Args:
        command: As in a shell, but run without one.
        rows: N rows.
        others: N rows of the model that they are compared with.
    """
    original = [pair_as_json(row, other) for row, other in zip(rows, others, strict=True)]
    swapped = [pair_as_json(other, row) for row, other in zip(rows, others, strict=True)]
    verdicts = query_judge(command, [*original, *swapped])
    pairs = zip(verdicts[: len(original)], verdicts[len(original) :], strict=True)
    return [(first + 1 - second) / 2 for first, second in pairs]


def pair_as_json(row: dict[str, object], other: dict[str, object]) -> str:
    """One line of what the command reads."""
    named = {"prompt": row["prompt"], "a": row["completion"], "b": other["completion"]}
    return json.dumps({name: conversation_text(value) for name, value in named.items()})


def query_judge(command: str, questions: Sequence[str]) -> list[float]:
    """A verdict per question: 1 for a, 0 for b, 1/2 for a tie."""
    try:
        argv = shlex.split(command)
        process = subprocess.run(
            argv, input="\n".join([*questions, ""]), capture_output=True, encoding="utf-8"
        )
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--judge {command!r} could not be started: {error}.") from error
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--judge {command!r} ended with status {process.returncode}: {last[:200]}")
    lines = process.stdout.strip().splitlines()
    if len(lines) != len(questions):
        raise UserError(
            f"--judge {command!r} printed {len(lines)} lines for {len(questions)} pairs: it must "
            f"print a, b or tie for each line that it reads, and nothing else."
        )
    for line_number, line in enumerate(lines, 1):
        if line.strip() not in VERDICT_SCORES:
            raise UserError(
                f"--judge {command!r}: line {line_number} is {line[:60]!r}; wanted: a, b or tie."
            )
    return [VERDICT_SCORES[line.strip()] for line in lines]

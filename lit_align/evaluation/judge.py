"""LLM-as-a-judge: a command that decides which of two responses is better.

The command may be a script, a client of a model behind an API, or a person.
"""

import json
import shlex
import subprocess
from collections.abc import Sequence

from lit_align.errors import UserError
from lit_align.evaluation.statistics import ResponseRows
from lit_align.runs.run_folder import conversation_text

VERDICT_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def judge_pairs(command: str, rows: ResponseRows, others: ResponseRows) -> list[float]:
    """Return [N] wins: 1 if the judge prefers a response to the other one, 0.5 for a tie.

    The command runs once. It reads a JSON object per line, with `prompt`, `a` and `b`, and prints
    a line for each: a, b or tie. It judges every pair in both orders, and the mean of the two
    verdicts counts. A preference for the first or second position cancels out.

    Args:
        command: Program and arguments, quoted as in a shell. It runs without a shell.
        rows: N rows.
        others: N rows of the other model for the same prompts.
    """
    original = [pair_as_json(row, other) for row, other in zip(rows, others, strict=True)]
    swapped = [pair_as_json(other, row) for row, other in zip(rows, others, strict=True)]
    verdicts = query_judge(command, [*original, *swapped])
    pairs = zip(verdicts[: len(original)], verdicts[len(original) :], strict=True)
    return [(first + 1 - second) / 2 for first, second in pairs]


def pair_as_json(row: dict[str, object], other: dict[str, object]) -> str:
    """Return one line of the command's input.

    Example:
        >>> pair_as_json({"prompt": "p", "completion": "x"}, {"completion": "y"})
        '{"prompt": "p", "a": "x", "b": "y"}'
    """
    named = {"prompt": row["prompt"], "a": row["completion"], "b": other["completion"]}
    return json.dumps({name: conversation_text(value) for name, value in named.items()})


def query_judge(command: str, pairs: Sequence[str]) -> list[float]:
    """Run the command once and return a verdict per pair: 1 for a, 0 for b, 0.5 for a tie.

    Args:
        command: Program and arguments, quoted as in a shell.
        pairs: Lines of the command's input.
    """
    try:
        argv = shlex.split(command)
        process = subprocess.run(
            argv, input="\n".join([*pairs, ""]), capture_output=True, encoding="utf-8"
        )
    except (OSError, ValueError, IndexError) as error:  # not found, bad quotes, empty
        raise UserError(f"--judge {command!r} could not be started: {error}.") from error
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise UserError(f"--judge {command!r} ended with status {process.returncode}: {last[:200]}")
    lines = process.stdout.strip().splitlines()
    if len(lines) != len(pairs):
        raise UserError(
            f"--judge {command!r} printed {len(lines)} lines for {len(pairs)} pairs. Print a, b "
            f"or tie for each line of the input, and nothing else."
        )
    for line_number, line in enumerate(lines, 1):
        if line.strip() not in VERDICT_SCORES:
            raise UserError(
                f"--judge {command!r}: line {line_number} must be a, b or tie, found {line[:60]!r}."
            )
    return [VERDICT_SCORES[line.strip()] for line in lines]

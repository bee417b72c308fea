"""Reader of a run folder that `lit-align fit` wrote."""

import csv
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lit_align.data.json_lines import json_lines, parse_json_object
from lit_align.errors import UserError
from lit_align.renamed import renamed_log_key

ResponseRow = dict[str, object]
Points = list[tuple[float, float]]  # position on the x axis, value

COMPLETIONS_FILE = re.compile(r"(rollout|held_out)_(\d+)(?:\.rank\d+)?\.jsonl")
ITERATION_PHASES = ("rollout", "score", "prepare", "update")  # in this order, before others
PREDICTIONS_FILE = re.compile(r"predictions(?:\.rank\d+)?\.jsonl")


class RunFolder:
    """Records of a run: config, curves, completions, memory by phase.

    Args:
        path: Run folder, `trainer.default_root_dir` of the run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run folder. Give the folder of a fit.")
        if not (self.path / "metrics.csv").is_file():
            found = ", ".join(sorted(file.name for file in self.path.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{path}: no metrics.csv, so `lit-align fit` did not write this folder. "
                f"Found: {found}."
            )

    @cached_property
    def config(self) -> dict[str, str]:
        """Resolved settings by dotted name without `init_args`. Empty without config.yaml."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return {}
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        return flatten_settings(settings) if isinstance(settings, dict) else {}

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """Rows of metrics.csv without empty cells."""
        file = self.path / "metrics.csv"
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(lines)]
        rows = [row for row in rows if row.get("step", "").isdigit()]
        if not rows:
            raise UserError(f"{file} has no rows yet. Wait for the first logged step.")
        warn_of_old_log_keys(file, list(dict.fromkeys(name for row in rows for name in row)))
        return rows

    @property
    def axis(self) -> str:
        """Unit of the curves' x axis: rollouts or optimizer steps."""
        online = any("iteration" in row for row in self.rows)
        return "rollouts" if online else "optimizer steps"

    @cached_property
    def curves(self) -> dict[str, Points]:
        """Finite values of each metric over rollouts, or over optimizer steps if there are none.

        Values that are logged between two rollouts, such as a validation's, belong to the first.
        """
        online, position = self.axis == "rollouts", 0.0
        curves: dict[str, Points] = {}
        for row in self.rows:
            position = float(row.get("iteration", position)) if online else float(row["step"]) + 1
            for name, text in row.items():
                value = parse_number(text)
                if name not in ("step", "iteration", "epoch") and math.isfinite(value):
                    curves.setdefault(name, []).append((position, value))
        return {name: sorted(curves[name]) for name in sorted(curves)}

    @cached_property
    def num_non_finite(self) -> int:
        """Number of logged values that are NaN or infinite, which the curves leave out."""
        return sum(
            not math.isfinite(parse_number(text)) for row in self.rows for text in row.values()
        )

    @cached_property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by phase and category, of the rank with the largest peak. Empty without files."""
        phases: dict[str, dict[str, float]] = {}
        for file in sorted(self.path.glob("memory*.csv")):
            with file.open(newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    phase = row.pop("phase", "")
                    sizes = {
                        k: v for k, size in row.items() if math.isfinite(v := parse_number(size))
                    }
                    if sizes.get("peak", 0.0) > phases.get(phase, {}).get("peak", -1.0):
                        phases[phase] = sizes
        return phases

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Mean seconds per rollout by phase, from `time/<phase>`. Empty if not logged."""
        found = {k.removeprefix("time/"): v for k, v in self.curves.items() if k[:5] == "time/"}
        order = [
            *(phase for phase in ITERATION_PHASES if phase in found),
            *sorted(found.keys() - {*ITERATION_PHASES}),
        ]
        return {name: math.fsum(y for _, y in found[name]) / len(found[name]) for name in order}

    @cached_property
    def rollouts(self) -> dict[int, list[Path]]:
        """Files of sampled responses by rollout, one per rank."""
        return self.completion_files("rollout")

    @cached_property
    def held_out(self) -> dict[int, list[Path]]:
        """Files of responses to held-out prompts, by the number of rollouts before."""
        return self.completion_files("held_out")

    def completion_files(self, kind: str) -> dict[int, list[Path]]:
        """Return the files of one kind by their number.

        Args:
            kind: "rollout" or "held_out".
        """
        files: dict[int, list[Path]] = {}
        for file in sorted(self.path.glob("completions/*.jsonl")):
            found = COMPLETIONS_FILE.fullmatch(file.name)
            if found and found[1] == kind:
                files.setdefault(int(found[2]), []).append(file)
        return dict(sorted(files.items()))

    @property
    def predictions(self) -> list[Path]:
        """Files that `lit-align predict` wrote, one per rank."""
        return [
            each for each in sorted(self.path.glob("*.jsonl")) if PREDICTIONS_FILE.match(each.name)
        ]


def parse_number(text: str | None) -> float:
    """Return the number of a cell, or NaN for any other text.

    Example:
        >>> parse_number("0.5"), parse_number("")
        (0.5, nan)
    """
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def warn_of_old_log_keys(file: Path, names: list[str]) -> None:
    """Print one sentence if columns have log keys of version 0.1. They are read as they are.

    Args:
        file: metrics.csv.
        names: Its columns.

    Example:
        >>> warn_of_old_log_keys(Path("metrics.csv"), ["loss", "objective/kl"])
        metrics.csv has 1 column(s) of version 0.1: objective/kl was renamed to kl/per_response_k1.
    """
    sentences = [sentence for name in names if (sentence := renamed_log_key(name))]
    if sentences:
        first, more = sentences[0].removesuffix("."), ", ..." if len(sentences) > 1 else "."
        print(f"{file} has {len(sentences)} column(s) of version 0.1: {first}{more}")


def iterate_settings(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting. Empty sections are values.

    Args:
        settings: Nested dictionaries of settings.
        name: Dotted name of `settings`. Default: the top level.

    Example:
        >>> list(iterate_settings({"model": {"init_args": {"beta": 0.5}}, "seed": 3}))
        [('model.init_args.beta', 0.5), ('seed', 3)]
    """
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from iterate_settings(value, f"{name}.{key}" if name else key)
    else:
        yield name, settings


def flatten_settings(settings: object) -> dict[str, str]:
    """Return settings as text by dotted name, without `init_args` and `class_path`.

    Example:
        >>> flatten_settings({"model": {"class_path": "ReMax", "init_args": {"beta": 0.5}}})
        {'model': 'ReMax', 'model.beta': '0.5'}
    """
    flat = {}
    for name, value in iterate_settings(settings):
        short = name.replace(".init_args.", ".").removesuffix(".class_path")
        flat[short] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def read_responses(files: list[Path]) -> list[ResponseRow]:
    """Return the rows of files of JSON lines, one response each.

    Args:
        files: One file per rank. A killed run may have written half of the last line.
    """
    rows: list[ResponseRow] = []
    for file in files:
        complete, _, last = file.read_text(encoding="utf-8").rpartition("\n")
        rows.extend(json_lines(file, complete))
        if last.strip():
            with suppress(UserError):  # half a line is not a row
                rows.append(parse_json_object(file, "the last line", last))
    return rows


def conversation_text(turns: object) -> str:
    r"""Return a plain text as it is, and a conversation with each role before its content.

    A single message is returned without its role.

    Example:
        >>> turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        >>> conversation_text(turns)
        'system: a\nuser: b'
    """
    if isinstance(turns, list):
        messages = [turn for turn in turns if isinstance(turn, dict)]
        if len(messages) == 1:
            return str(messages[0].get("content", ""))
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in messages)
    return "" if turns is None else str(turns)

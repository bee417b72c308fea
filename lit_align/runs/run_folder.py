"""A run folder as `lit-align fit` leaves it, read back."""

import csv
import json
import math
import re
from functools import cached_property
from pathlib import Path

import yaml

from lit_align.errors import UserError

ResponseRow = dict[str, object]
Points = list[tuple[float, float]]  # position on the x axis, value

COMPLETIONS_FILE = re.compile(r"(rollout|held_out)_(\d+)(?:\.rank\d+)?\.jsonl")
ITERATION_PHASES = ("rollout", "score", "prepare", "update")  # in this order; others come behind
PREDICTIONS_FILE = re.compile(r"predictions(?:\.rank\d+)?\.jsonl")


class RunFolder:
    """What a run recorded: config, curves, completions, memory by phase.

    Args:
        path: The folder, `trainer.default_root_dir` of the run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run folder.")
        if not (self.path / "metrics.csv").is_file():
            found = ", ".join(sorted(file.name for file in self.path.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{path}: no metrics.csv, so this is no folder that `lit-align fit` wrote. "
                f"Found: {found}."
            )

    @cached_property
    def config(self) -> dict[str, str]:
        """The resolved settings by dotted name, without `init_args`; empty if none were kept."""
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
        """The lines of metrics.csv, without what they leave empty."""
        file = self.path / "metrics.csv"
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(lines)]
        rows = [row for row in rows if row.get("step", "").isdigit()]
        if not rows:
            raise UserError(f"{file} has no rows yet: wait for the first logged step.")
        return rows

    @property
    def axis(self) -> str:
        """What the curves' x axis counts."""
        online = any("iteration" in row for row in self.rows)
        return "rollouts" if online else "optimizer steps"

    @cached_property
    def curves(self) -> dict[str, Points]:
        """Each metric's finite values over rollouts, or over optimizer steps where there are none.

        What is logged beside the rollouts stands at the last one before it.
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
        """How many logged values are no finite numbers; they are in no curve."""
        return sum(
            not math.isfinite(parse_number(text)) for row in self.rows for text in row.values()
        )

    @cached_property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by phase and category, the most of all ranks; empty if nobody measured."""
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
        """Mean seconds per rollout by phase, from metrics `time/<phase>`; empty if not logged."""
        found = {k.removeprefix("time/"): v for k, v in self.curves.items() if k[:5] == "time/"}
        order = [
            *(phase for phase in ITERATION_PHASES if phase in found),
            *sorted(found.keys() - {*ITERATION_PHASES}),
        ]
        return {name: math.fsum(y for _, y in found[name]) / len(found[name]) for name in order}

    @cached_property
    def rollouts(self) -> dict[int, list[Path]]:
        """The files of completions by rollout, one per rank."""
        return self.completion_files("rollout")

    @cached_property
    def held_out(self) -> dict[int, list[Path]]:
        """The files of answers to held-out prompts, by the rollouts before that validation."""
        return self.completion_files("held_out")

    def completion_files(self, kind: str) -> dict[int, list[Path]]:
        """The files of one kind of completions by number."""
        files: dict[int, list[Path]] = {}
        for file in sorted(self.path.glob("completions/*.jsonl")):
            found = COMPLETIONS_FILE.fullmatch(file.name)
            if found and found[1] == kind:
                files.setdefault(int(found[2]), []).append(file)
        return dict(sorted(files.items()))

    @property
    def predictions(self) -> list[Path]:
        """The files that a `predict` wrote here."""
        return [
            each for each in sorted(self.path.glob("*.jsonl")) if PREDICTIONS_FILE.match(each.name)
        ]


def parse_number(text: str | None) -> float:
    """A number of a table, NaN for anything else."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def flatten_settings(settings: object, name: str = "") -> dict[str, str]:
    """Nested settings by dotted name, as text."""
    if isinstance(settings, dict) and settings:
        parts = (flatten_settings(value, f"{name}.{key}") for key, value in settings.items())
        return {key: value for part in parts for key, value in part.items()}
    short = name.removeprefix(".").replace(".init_args.", ".").removesuffix(".class_path")
    text = settings if isinstance(settings, str) else json.dumps(settings, default=str)
    return {short: text}


def read_responses(files: list[Path]) -> list[ResponseRow]:
    """The lines of JSON files: one answer each. Half a line at the end, of a killed run, is no row.

    Args:
        files: One per rank.
    """
    rows: list[ResponseRow] = []
    for file in files:
        lines = file.read_text(encoding="utf-8").split("\n")
        for position, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if position == len(lines):
                    continue
                raise UserError(f"line {position} of {file} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"line {position} of {file} is no JSON object.")
            rows.append(row)
    return rows


def conversation_text(turns: object) -> str:
    """Return a plain text as it is, and a conversation with each role before its content."""
    if isinstance(turns, list):
        messages = [turn for turn in turns if isinstance(turn, dict)]
        if len(messages) == 1:
            return str(messages[0].get("content", ""))
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in messages)
    return "" if turns is None else str(turns)

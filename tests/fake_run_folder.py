"""Run folders as `lit-align fit` writes them, without a run."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

CONFIG = """seed_everything: {seed}
trainer: {{default_root_dir: {folder}}}
model:
  class_path: lit_align.algorithms.remax.ReMax
  init_args: {{kl_coef: {kl_coef}, policy: {{class_path: Policy, init_args: {{path: base}}}}}}
"""


def answer(prompt: object, completion: object, score: float = 0.0) -> dict[str, object]:
    return {
        "prompt": prompt,
        "completion": completion,
        "score": score,
        "length": 3,
        "truncated": False,
        "greedy": False,
    }


def write_run(
    folder: Path,
    rows: Iterable[dict[str, object]] = (),
    seed: int = 0,
    kl_coef: float = 0.1,
    completions: dict[str, list[dict[str, object]]] | None = None,
) -> Path:
    """Write metrics.csv, config.yaml and completions, and return the folder."""
    (folder / "completions").mkdir(parents=True)
    rows = list(rows) or [
        {"step": s, "iteration": float(s + 1), "reward": 0.5 * s} for s in range(4)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    config = CONFIG.format(seed=seed, folder=folder, kl_coef=kl_coef)
    (folder / "config.yaml").write_text(config)
    for name, table in (completions or {}).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        (folder / "completions" / f"{name}.jsonl").write_text(lines)
    return folder

"""What the docs quote is in the code, the files they name exist, and their commands work."""

import json
import re
from pathlib import Path

import pytest

from lit_align.cli.main import main
from lit_align.data.toy import toy_rows

ROOT = Path(__file__).parents[1]
PAGES = [
    "one_step",
    "design",
    "sft",
    "reward_model",
    "dpo",
    "remax",
    "grpo",
    "rloo",
    "grpovi",
    "ppo",
    "hydra",
    "rto",
    "sltrain",
    "scaling",
    "galore",
    "memory",
    "results",
    "spr",
    "resume",
    "run_folder",
    "report",
    "evaluate",
    "from_trl",
]
TEXTS = {page: (ROOT / "docs" / f"{page}.md").read_text() for page in PAGES}
FEW = [
    *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    *("--data.max_rows", "16", "--data.batch_size", "4"),
]


def commands(page: str) -> list[list[str]]:
    """Commands of a page that the toy data can serve."""
    lines = TEXTS[page].replace("\\\n", " ").splitlines()
    words = [line.partition(" #")[0].split() for line in lines if line.startswith("    lit-align")]
    return [line[1:] for line in words if "toy" in line or "--data.path" in line]


@pytest.mark.parametrize("page", PAGES)
def test_quoted_lines_are_in_the_code(page):
    files = sorted((ROOT / "lit_align").rglob("*.py"))
    code = {line.strip() for path in files for line in path.read_text().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        for line in block.strip().splitlines():
            assert line.strip() in code, line


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_functions_exist(page):
    names = set(re.findall(r"\b((?:lit_align|tests|docs)/[\w/]+\.(?:py|md))", TEXTS[page]))
    for name in names:
        assert (ROOT / name).is_file(), name
    code = "\n".join(path.read_text() for path in (ROOT / "lit_align").rglob("*.py"))
    for owner, member in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)[`(]", TEXTS[page]):
        assert f"class {owner}" in code, owner
        assert re.search(rf"(def {member}\(|\b{member}: )", code), f"{owner}.{member}"


def test_pages_have_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 10


@pytest.mark.long
def test_commands_run_in_the_order_of_the_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = toy_rows("test")[:200]
    for name, columns in (
        ("my_answers", ("prompt", "completion")),
        ("my_pairs", ("prompt", "chosen", "rejected")),
    ):
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    for page in ("sft", "reward_model", "dpo", "remax", "one_step"):
        for line in commands(page):
            # models of the hub are not here: the embedded one takes their place
            toy = [] if "toy" in line else ["--config", "toy"]
            place = line.index("--data.path") if "--data.path" in line else len(line)
            few = FEW if line[0] == "fit" else FEW[4:]
            assert main([*line[:place], *toy, *line[place:], *few]) == 0, " ".join(line)
    assert (tmp_path / "runs" / "answers" / "predictions.jsonl").is_file()

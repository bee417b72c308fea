"""What the docs quote is in the code, the files they name exist, and their commands work."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from lit_align.cli.main import main
from lit_align.data.toy import toy_rows

ROOT = Path(__file__).parents[1]
PAGES = [
    "index",
    "quickstart",
    "your_data",
    "your_reward",
    "papers",
    "faq",
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
    *("--data.max_rows", "32", "--data.batch_size", "16"),
]
ELSEWHERE = {  # commands that another test runs, or that need what a test machine lacks
    r"strategy (fsdp2|ddp)|--config fsdp": "tests/scale, and GPUs",
    r"WandbLogger|--tasks": "test_response_log.py and test_lm_eval.py",
    r"docs/examples/|runs/quickstart": "tests/test_real_data_runs.py and `make quickstart`",
}


def commands(page: str) -> list[list[str]]:
    """The words behind `lit-align` of a page's commands, but for those that run elsewhere."""
    lines = TEXTS[page].replace("\\\n", " ").splitlines()
    lines = [line.partition("  #")[0] for line in lines if line.startswith("    lit-align ")]
    lines = [line for line in lines if not any(re.search(each, line) for each in ELSEWHERE)]
    return [shlex.split(line)[1:] for line in lines]


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


def test_what_runs_elsewhere_is_still_in_a_page():
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, text) for text in TEXTS.values()), pattern


ROWS = {  # files that the pages name, from the embedded reviews
    "my_answers": ("prompt", "completion"),
    "my_pairs": ("prompt", "chosen", "rejected"),
    "my_prompts": ("prompt", "answer", "topic"),
    "my_scored_answers": ("prompt", "completion", "score"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the files and the runs that pages build on."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [
        {**row, "answer": "3", "topic": "music", "score": 0.5} for row in toy_rows("test")[:200]
    ]
    for name, columns in ROWS.items():
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "my_rewards.py").write_text(indented("your_reward", "def brief"))
    (folder / "my_judge.py").write_text(indented("evaluate", "import json, sys"))
    with contextlib.chdir(folder):
        for config, place in (
            *(("sft", "sft"), ("reward_model", "reward_model"), ("remax", "remax")),
            *(("remax", "remax_0"), ("remax", "remax_1"), ("ppo", "ppo")),
        ):
            words = ["fit", "--config", config, "--config", "toy", *FEW]
            assert main([*words, "--trainer.default_root_dir", f"runs/{place}"]) == 0
    return folder


def indented(page: str, start: str) -> str:
    """The indented block of a page that begins with these words."""
    (block,) = (
        block
        for block in re.findall(r"(?:^    .*\n|^\n)+", TEXTS[page], re.MULTILINE)
        if block.lstrip("\n").startswith(f"    {start}")
    )
    return textwrap.dedent(block)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run_in_the_order_of_the_page(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    for words in commands(page):
        if {"int8", "adamw_8bit"} & set(words) and not importlib.util.find_spec("torchao"):
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("review of the river\n/quit\n"))
        assert main(shortened(words)) == 0, " ".join(words)


def shortened(words: list[str]) -> list[str]:
    """The same on a few rows of the embedded data; models of the hub are not here."""
    if words[0] in ("report", "chat", "export"):
        return words
    if words[0] == "evaluate":
        return [*words, "--data.max_rows", "4", "--rollout.max_new_tokens", "8"]
    toy = [] if "toy" in words else ["--config", "toy"]
    place = words.index("--data.path") if "--data.path" in words else len(words)
    return [*words[:place], *toy, *words[place:], *(FEW if words[0] == "fit" else FEW[4:])]

"""The pages name what exists: settings, functions, files, log keys. Their commands parse."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import pkgutil
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

import lit_align
from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.cli import chat, evaluate, evaluate_run, export, plan
from lit_align.cli.align import AlignCLI
from lit_align.cli.configs import packaged_configs
from lit_align.cli.discovery import concrete_subclasses, import_all, init_arguments
from lit_align.cli.main import TOOLS, TRAINER_COMMANDS, main
from lit_align.cli.overlays import resolve_configs
from lit_align.cli.settings_parser import SettingsParser
from lit_align.data.base import TextDataModule
from lit_align.data.toy import toy_rows
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.sltrain import SLTrain
from lit_align.optim.galore import GaLoreAdamW
from lit_align.rewards.base import RewardFunction
from lit_align.runs.csv_log import ResumableCSVLogger

ROOT = Path(__file__).parents[1]
FILES = {file.stem: file for file in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]}
TEXTS = {page: file.read_text() for page, file in FILES.items()}
PAGES = list(TEXTS)
CODE = [*sorted((ROOT / "lit_align").rglob("*.py"))]


def code_spans(page: str) -> list[str]:
    """Return the texts in backticks of a page, without those of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def fenced_blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def indented_block(page: str, start: str) -> str:
    """Return the indented block of a page that begins with these words."""
    (block,) = (
        block
        for block in re.findall(r"(?:^    .*\n|^\n)+", TEXTS[page], re.MULTILINE)
        if block.lstrip("\n").startswith(f"    {start}")
    )
    return textwrap.dedent(block).strip("\n") + "\n"


def command_lines(page: str) -> list[str]:
    """Return the indented lines of a page with a command, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", TEXTS[page]).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("    ")]


def lit_align_commands(page: str) -> list[list[str]]:
    """Return the words after `lit-align` of each command of a page."""
    pattern = re.compile(r"^(?:srun .*|torchrun .*)?(?:lit-align|-m lit_align\.cli\.main) (.*)$")
    found = [pattern.match(line) for line in command_lines(page)]
    return [shlex.split(match[1]) for match in found if match]


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert (FILES[page].parent / link).is_file(), link


def test_every_page_is_in_the_navigation():
    config = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    sections = [pages for section in yaml.safe_load(config)["nav"] for pages in section.values()]
    listed = [page for pages in sections for page in pages]
    assert sorted(listed) == sorted(f"{page}.md" for page in PAGES if page != "README")


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for span in code_spans(page):
        for name in re.findall(r"\b(?:lit_align|configs|scripts|docs|tests)/[\w./-]*", span):
            assert (ROOT / name.rstrip(".")).exists(), name
        config = re.fullmatch(r"(\w+)\.yaml", span)
        if config and not span.startswith("my_") and span not in ("config.yaml", "hparams.yaml"):
            assert config[1] in packaged_configs(), span


@cache
def classes() -> dict[str, type]:
    """Return the classes of lit_align by name."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(lit_align.__path__, "lit_align."):
        if module.name != "lit_align.models.weights.torchao":
            members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            found |= {name: kind for name, kind in members if kind.__module__ == module.name}
    return found


def has_member(kind: type, name: str) -> bool:
    """Return True if a class has an attribute, a declared field, or sets it in its constructor."""
    annotations = [getattr(parent, "__annotations__", {}) for parent in kind.__mro__]
    declared = {field for fields in annotations for field in fields}
    sources = "".join(inspect.getsource(p) for p in kind.__mro__ if p.__module__[:3] == "lit")
    return hasattr(kind, name) or name in declared or f"self.{name} =" in sources


@pytest.mark.parametrize("page", PAGES)
def test_named_members_of_classes_exist(page):
    for owner, member in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)[`(]", TEXTS[page]):
        if f"{owner}.{member}" not in ("README.md", "CONTRIBUTING.md"):
            assert has_member(classes()[owner], member), f"{owner}.{member}"


@pytest.mark.parametrize("page", PAGES)
def test_named_functions_are_in_the_named_file(page):
    pattern = r"((?:`\w+`(?:, | and ))*`\w+`) in `(lit_align/[\w/]+\.py)`"
    for names, file in re.findall(pattern, TEXTS[page]):
        tree = ast.parse((ROOT / file).read_text())
        defined = {getattr(node, "name", None) for node in ast.walk(tree)}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, f"{names} in {file}"


def import_path(path: str) -> object:
    """Return the module, class or function that an import path names."""
    parts = path.split(".")
    found: object = lit_align
    for number, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_import_paths_exist(page):
    for path in set(re.findall(r"\blit_align(?:\.\w+)+", TEXTS[page])):
        assert import_path(path), path


@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_in_the_code(page):
    """Blocks with an import are examples for the reader; all others quote the code."""
    lines = {line.strip() for path in CODE for line in path.read_text().splitlines()}
    for block in fenced_blocks(page, "python"):
        if "import" in block:
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
        else:
            for line in block.strip().splitlines():
                assert line.strip() in lines, line


# Settings -----------------------------------------------------------------------------------------


def arguments_of(*bases: type) -> set[str]:
    """Return the arguments of the classes and of all classes that derive from them."""
    kinds = [kind for base in bases for kind in (base, *concrete_subclasses(base))]
    return set().union(*map(init_arguments, kinds))


@cache
def known_settings() -> dict[str, set[str]]:
    """Return the names that may follow a part of a dotted setting."""
    import_all()
    networks = arguments_of(Backbone)
    optimizers = arguments_of(GaLoreAdamW) | {*inspect.signature(torch.optim.AdamW).parameters}
    return {
        "model": arguments_of(Algorithm) | {"help", "class_path"},
        "data": arguments_of(TextDataModule) | {"help"},
        "rollout": arguments_of(Rollout),
        "reward": arguments_of(Reward) | {"help"},
        "trainer": {*inspect.signature(Trainer).parameters},
        **dict.fromkeys(("policy", "critic", "reference", "reward_model"), networks),
        **dict.fromkeys(("dpo", "dpo_reference"), networks),
        "lora": arguments_of(LoRA),
        "sltrain": arguments_of(SLTrain),
        "optimizer": optimizers,
        "functions": arguments_of(RewardFunction),
        "strategy": arguments_of(FSDP2),
        "callbacks": arguments_of(Callback),
        "logger": arguments_of(ResumableCSVLogger) | {*inspect.signature(WandbLogger).parameters},
    }


@pytest.mark.parametrize("page", PAGES)
def test_named_settings_exist(page):
    """`--model.policy.path` and `data.max_rows`: each part is an argument of the part before."""
    pattern = r"(?<![\w./])((?:--)?(?:model|data|rollout|reward|trainer)\.[a-z][\w.]*)"
    for span in code_spans(page):
        for setting in re.findall(pattern, span):
            if setting.endswith((".safetensors", ".py", ".jsonl")):
                continue
            parts = setting.lstrip("-").rstrip(".").split(".")
            for section, name in itertools.pairwise(parts):
                assert name in known_settings()[section], setting


LOG_GROUPS = (
    *("val", "kl", "rewards", "policy", "value", "objective", "critic", "completions", "loss"),
    *("clip_ratio", "grad_norm", "entropy", "spr", "rto", "time", "memory", "sampling", "logps"),
)


@cache
def logged_names() -> re.Pattern[str]:
    """Return a pattern of all names in the code that a log key may have."""
    names: set[str] = set()
    for path in CODE:
        nodes = [] if path.name == "renamed.py" else ast.walk(ast.parse(path.read_text()))
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(re.escape(node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"[\w<>/]*"
                    for part in node.values
                )
                pattern = "".join(parts)
                if re.search(r"[a-z]+_?/|/[a-z]|[a-z]/", pattern.replace(r"[\w<>/]*", "")):
                    names.add(pattern)
            elif isinstance(node, ast.keyword) and node.arg:
                names.add(node.arg)
    return re.compile("|".join(sorted(name for name in names if re.search(r"[a-z]", name))))


@pytest.mark.parametrize("page", PAGES)
def test_log_keys_are_those_of_the_code(page):
    for span in code_spans(page):
        key = re.fullmatch(rf"(?:{'|'.join(LOG_GROUPS)})/[\w<>/]+", span)
        if key:
            name = span.removeprefix("val/")
            assert logged_names().fullmatch(name) or logged_names().fullmatch(span), span


# Commands parse -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the repository's folders and the files that the pages let a reader write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("docs", "tests", "scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_module.py").write_text(indented_block("add_an_algorithm", '"""RAFT'))
    (folder / "my_config.yaml").write_text(indented_block("add_an_algorithm", "# RAFT"))
    (folder / "my_remax.py").write_text(fenced_blocks("README", "python")[1])
    (folder / "my_rewards.yaml").write_text(fenced_blocks("your_reward", "yaml")[0])
    (folder / "remax.yaml").write_text(packaged_configs()["remax"])
    (folder / "runs" / "remax").mkdir(parents=True)
    (folder / "runs" / "remax" / "config.yaml").write_text(packaged_configs()["remax"])
    return folder


class ParseOnlyCLI(AlignCLI):
    """The command line of the Trainer, which builds and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Fill nothing in."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


@pytest.fixture(scope="module")
def parser():
    """The parser of fit, validate, test and predict, made once."""
    import_all()
    return ParseOnlyCLI(resolve_configs(["fit", "--config", "remax", "--config", "toy"])).parser


def parse_command(words: list[str], parser, monkeypatch) -> None:
    """Parse a command of a page by the real parser, without running it."""
    name, args = words[0], words[1:]
    if name in TRAINER_COMMANDS:
        parser.parse_args(resolve_configs(words))
    elif name == "plan":
        _, args = plan.build_parser().parse_known_args(args)
        parser.parse_args(resolve_configs(["fit", *args]))
    elif name == "evaluate":
        monkeypatch.setattr(SettingsParser, "instantiate_classes", lambda parser, options: options)
        monkeypatch.setattr(evaluate_run, "resolve_model", str)
        evaluate_run.parse(args, evaluate.add_options)
    elif name == "configs":
        assert args == ["list"] or (args[0] == "copy" and args[1] in packaged_configs())
    elif name == "report":
        assert [word for word in args if word.startswith("-")] in ([], ["--out"])
    else:
        {"chat": chat, "export": export}[name].build_parser().parse_args(args)


@pytest.mark.parametrize("page", [page for page in PAGES if lit_align_commands(page)])
def test_commands_parse(page, clone, parser, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.syspath_prepend(clone)
    for words in lit_align_commands(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in {**TRAINER_COMMANDS, **TOOLS}, words
        is_help = any(".help" in word or word == "--help" for word in words)
        with contextlib.redirect_stdout(io.StringIO()):
            if is_help:
                with pytest.raises(SystemExit, match=r"^0$|^None$"):
                    parse_command(words, parser, monkeypatch)
            else:
                parse_command(words, parser, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if fenced_blocks(page, "yaml")])
def test_yaml_blocks_parse(page, clone, parser, monkeypatch):
    """A block is an overlay over GRPO on the toy data."""
    monkeypatch.chdir(clone)
    for block in fenced_blocks(page, "yaml"):
        (clone / "block.yaml").write_text(block)
        words = ["fit", "--config", "grpo", "--config", "toy", "--config", "block.yaml"]
        parser.parse_args(resolve_configs(words))


def test_no_indented_block_hides_yaml():
    """Settings are fenced for the test above, except on the page that has its own test."""
    for page in PAGES:
        if page != "add_an_algorithm":
            assert not re.search(r"^    (model|data|reward|rollout|trainer):$", TEXTS[page], re.M)


@pytest.mark.parametrize("page", PAGES)
def test_scripts_have_the_options_that_the_pages_give(page):
    for line in command_lines(page):
        script = re.match(r"^(?:[A-Z_]+=\S+ )*python (\S+\.py)(.*)$", line)
        if script:
            source = (ROOT / script[1]).read_text()
            for option in re.findall(r"(--\w+)", script[2]):
                assert option == "--help" or f'"{option}"' in source, line


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in command_lines(page):
        if line.startswith("make "):
            assert line.split()[1] in targets, line


def test_pages_have_commands():
    assert sum(len(lit_align_commands(page)) for page in PAGES) >= 80


# Commands run -------------------------------------------------------------------------------------

FEW = [
    *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    *("--data.max_rows", "32", "--data.batch_size", "16"),
]
RUN_ELSEWHERE = {  # commands that another test runs, or that need what a test machine lacks
    r"strategy \S*(fsdp2|FSDP2|ddp)|--config (fsdp|multi_node)": "tests/scale, and GPUs",
    r"WandbLogger|--tasks": "test_response_log.py and test_lm_eval.py",
    r"docs/examples/|runs/quickstart": "tests/test_real_data_runs.py and `make quickstart`",
    r"my_module|my_config|my_remax": "test_add_an_algorithm.py and test_readme.py",
    r"^plan ": "tests/plan and tests/cli/test_plan.py",
    r"Qwen/Qwen2.5-0.5B-Instruct": "models of the hub",
    r"\.help|--help|^configs ": "tests/cli/test_main.py and test_configs.py",
}
ROWS = {  # files that the pages name, from the embedded reviews
    "my_answers": ("prompt", "completion"),
    "my_pairs": ("prompt", "chosen", "rejected"),
    "my_prompts": ("prompt", "answer", "topic"),
    "my_scored_answers": ("prompt", "completion", "score"),
}


def commands_to_run(page: str) -> list[list[str]]:
    """Return the commands of a page that no other test runs."""
    return [
        words
        for words in lit_align_commands(page)
        if not any(re.search(pattern, " ".join(words)) for pattern in RUN_ELSEWHERE)
    ]


def test_what_runs_elsewhere_is_still_in_a_page():
    every = [" ".join(words) for page in PAGES for words in lit_align_commands(page)]
    for pattern in RUN_ELSEWHERE:
        assert any(re.search(pattern, line) for line in every), pattern


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
    (folder / "my_rewards.py").write_text(indented_block("your_reward", "def brief"))
    (folder / "my_rewards.yaml").write_text(fenced_blocks("your_reward", "yaml")[0])
    (folder / "my_judge.py").write_text(indented_block("evaluate", "import json, sys"))
    with contextlib.chdir(folder):
        for config, name in (
            *(("sft", "sft"), ("reward_model", "reward_model"), ("remax", "remax")),
            *(("remax", "remax_0"), ("remax", "remax_1"), ("ppo", "ppo")),
        ):
            words = ["fit", "--config", config, "--config", "toy", *FEW]
            assert main([*words, "--trainer.default_root_dir", f"runs/{name}"]) == 0
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_run(page)])
def test_commands_run_in_the_order_of_the_page(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    for words in commands_to_run(page):
        if {"int8", "adamw_8bit"} & set(words) and not importlib.util.find_spec("torchao"):
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("review of the river\n/quit\n"))
        assert main(shorten_command(words)) == 0, " ".join(words)


def shorten_command(words: list[str]) -> list[str]:
    """Return the command on a few rows of the embedded data; models of the hub are not here."""
    if words[0] in ("report", "chat", "export"):
        return words
    if words[0] == "evaluate":
        return [*words, "--data.max_rows", "4", "--rollout.max_new_tokens", "8"]
    toy = [] if "toy" in words else ["--config", "toy"]
    place = words.index("--data.path") if "--data.path" in words else len(words)
    return [*words[:place], *toy, *words[place:], *(FEW if words[0] == "fit" else FEW[4:])]

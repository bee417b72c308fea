"""`import lit_align` is cheap, and its public names are those that type checkers see."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_align

HEAVY = ("torch", "transformers", "lightning")
COMMANDS = [
    ["--help"],
    ["--version"],
    ["configs", "list"],
    *([tool, "--help"] for tool in ("plan", "export", "evaluate", "report", "chat", "configs")),
]
PROGRAM = """
import sys
from lit_align.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_no_heavy_library(words):
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.splitlines()[-1] == "[]"


def test_import_of_the_package_imports_no_heavy_library():
    program = f"import sys, lit_align; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(lit_align.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: statement.module.removeprefix("lit_align.")
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == lit_align._MODULES


@pytest.mark.parametrize("name", sorted(lit_align._MODULES))
def test_a_public_name_is_importable_from_the_top(name):
    assert getattr(lit_align, name).__name__ == name
    assert name in dir(lit_align)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lit_align' has no attribute 'Remax'"):
        lit_align.Remax  # noqa: B018


@pytest.mark.long  # mypy reads the whole package
def test_a_users_program_is_typed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from lit_align import GRPO, Policy\n"
        "algorithm = GRPO(policy=lambda: Policy('folder'), num_samples=4)\n"
        "reveal_type(algorithm.num_samples)\n"
        "GRPO(num_sample=4)\n"
    )
    words = ["-m", "mypy", "--strict", "--follow-imports", "silent", str(program)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert 'Revealed type is "int"' in done.stdout or "builtins.int" in done.stdout, done.stdout

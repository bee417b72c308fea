"""The words of code and pages: no dialect, American identifiers, names that mean one thing."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "lit_align").rglob("*.py"))
OLD_NAMES = ROOT / "lit_align" / "renamed.py"  # lists the old words
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "docs").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DIALECT = re.compile(
    r"\b(?i:wears?|wore|worn|wearing|lends?|lent|thaw(?:s|ed)?|foretold|foretells?|anew|shall|"
    r"whoever|whomever|guests?|sleepers?|parked|parking|deaf|unwanted|ledgers?|says? of|hears?|"
    r"heard|told|alike)\b|\bis none\b"
)
BRITISH = re.compile(
    r"normalis|quantis|factoris|behaviour|synchronis|initialis|optimis(?!tic)|colour|centre(?!$)",
    re.IGNORECASE,
)
CONTRACT = {"behaviour_logprobs"}  # an argument's name that programs outside this repository use
SHARED_NAMES = {"main", "setup", "build_parser", "ABOUT"}  # one per command


def occurrences(files: list[Path]) -> list[str]:
    """Return file, line number and word of each dialect word, but in this file's own list."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for path in files
        if path not in (Path(__file__), OLD_NAMES)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for found in DIALECT.finditer(line)
    ]


@pytest.mark.parametrize(
    "files",
    [PACKAGE, PAGES, CONFIGS, SCRIPTS, TESTS],
    ids=["code", "pages", "configs", "scripts", "tests"],
)
def test_there_is_no_dialect(files):
    assert not occurrences(files)


def test_identifiers_are_american():
    found = set()
    for path in [*PACKAGE, *TESTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, field, None) for field in ("id", "name", "attr", "arg")]
            found |= {name for name in names if isinstance(name, str) and BRITISH.search(name)}
    assert found <= CONTRACT


def module_level_names(path: Path) -> set[str]:
    """Return the public functions, classes and constants that a module defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_means_one_thing():
    modules = defaultdict(list)
    for path in PACKAGE:
        for name in module_level_names(path):
            modules[name].append(str(path.relative_to(ROOT)))
    several = {name: files for name, files in modules.items() if len(files) > 1}
    assert not {name: files for name, files in several.items() if name not in SHARED_NAMES}


VAGUE = {"say", "cast", "come", "back", "take", "hear", "told", "said", "read", "give", "look"}
PARTICIPLES = re.compile(r"^[a-z]+(ed|wn|ught|ept|old|aid|eld)$")
NOUNS = {"teardown", "seed", "speed", "embed", "threshold", "shard_seed", "pad_packed"}


def public_functions() -> Counter[str]:
    """Return the names of all public functions and methods, with their number."""
    names: Counter[str] = Counter()
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names[node.name] += 1
    return names


def test_functions_are_verbs_or_nouns():
    """No bare participle (`answered`) and no short word that could be anything (`say`)."""
    bad = {name for name in public_functions() if PARTICIPLES.match(name) and name not in NOUNS}
    assert not bad | (VAGUE & set(public_functions()))

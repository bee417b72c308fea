"""Rules of the package that a machine can check: levels, circles, sizes, inheritance, names."""

import ast
import importlib
import inspect
import pkgutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_align

ROOT = Path(lit_align.__file__).parent
REPOSITORY = ROOT.parent
LEVELS = [
    "version errors renamed terminal",
    "batches functional optim configs",
    "models data",
    "algorithms rewards runs",
    "callbacks",
    "tools plan report evaluation",
    "cli",
]
MODEL_LEVELS = [
    "kernels weights sltrain",
    "adapters parallel generation",
    "hidden_states",
    "backbone",
]  # other modules of `models` are above these
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"]
FOLDERS = sorted({path.parent for path in FILES} - {ROOT})
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc"}
MAX_MODULES = 17  # about 15: a longer list is more than one subject
MAX_DEPTH = 6  # LightningModule -> Algorithm -> OnlineAlgorithm -> ActorCritic -> PPO -> RTO


def numbered(levels: list[str]) -> dict[str, int]:
    """Return the number of the level of each folder or module, from the bottom up."""
    return {name: number for number, names in enumerate(levels) for name in names.split()}


LEVEL, MODEL_LEVEL = numbered(LEVELS), numbered(MODEL_LEVELS)


def num_lines(node: ast.AST, source: str) -> int:
    """Return the lines of a module or function without its docstrings, so examples are free."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    total = source.count("\n") if isinstance(node, ast.Module) else node.end_lineno - node.lineno
    for inner in ast.walk(node):
        if isinstance(inner, kinds) and ast.get_docstring(inner) is not None:
            total -= inner.body[0].end_lineno - inner.body[0].lineno + 1
    return total


def module_of(path: Path) -> str:
    """Return the module's name, such as lit_align.models.policy, of a file."""
    return ".".join(["lit_align", *path.relative_to(ROOT).with_suffix("").parts])


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports, at its top or inside functions."""
    package = module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("lit_align"))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.startswith("lit_align"):
                found = importlib.util.find_spec(module)
                parts = [f"{module}.{alias.name}" for alias in node.names]
                is_folder = found is not None and found.submodule_search_locations is not None
                yield from (parts if is_folder and node.module is None else [module])


def folder_of(module: str) -> str:
    """Return the folder, or the top-level module, that a module belongs to."""
    return [*module.split("."), ""][1]


def short_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_a_folder_imports_itself_and_lower_levels(path):
    here = folder_of(module_of(path))
    for module in imports(path):
        there = folder_of(module)
        assert there == here or LEVEL[there] < LEVEL[here], f"{here} may not import {there}"


@pytest.mark.parametrize("path", sorted((ROOT / "models").rglob("*.py")), ids=short_name)
def test_folders_of_models_import_themselves_and_lower_levels(path):
    top = len(MODEL_LEVELS)
    here = module_of(path).split(".")[2]
    for module in imports(path):
        parts = module.split(".")
        if here in MODEL_LEVEL and parts[1] == "models" and parts[2] != here:
            level = MODEL_LEVEL.get(parts[2], top)
            assert level < MODEL_LEVEL[here], f"{here} may not import {module}"


def test_every_folder_has_a_level():
    names = {short_name(folder).split("/")[0] for folder in FOLDERS}
    assert names | {path.stem for path in ROOT.glob("[!_]*.py")} | {"configs"} == set(LEVEL)


def test_no_module_imports_itself_in_a_circle():
    graph = {module_of(path): set(imports(path)) for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert num_lines(tree, source) < 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert num_lines(node, source) < 40, f"{node.name} is longer than a screen"


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_every_file_has_a_docstring_and_a_name_of_its_own(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert not FORBIDDEN_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("folder", FOLDERS, ids=short_name)
def test_folders_list_few_modules(folder):
    # algorithms has one file per paper, so it grows
    if folder.name != "algorithms":
        assert len([path for path in folder.glob("*.py") if path in FILES]) <= MAX_MODULES


def test_packages_hold_no_code_below_the_top():
    for path in ROOT.rglob("__init__.py"):
        assert path.parent == ROOT or path.read_text() == "", path


def test_all_folders_and_configs_are_packaged():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(REPOSITORY) for path in ROOT.rglob("__init__.py")]
    names = [".".join(folder.parts) for folder in folders]
    assert settings["packages"] == sorted([*names, "lit_align.configs"])
    assert settings["package-dir"]["lit_align.configs"] == "configs"
    patterns = settings["package-data"]["lit_align.configs"]
    packaged = {path for pattern in patterns for path in (REPOSITORY / "configs").glob(pattern)}
    assert packaged == set((REPOSITORY / "configs").rglob("*.yaml"))
    assert packaged


def test_functional_knows_torch_only():
    for path in sorted((ROOT / "functional").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in {"torch", "typing", "collections", "math"}


def public_classes() -> Iterator[type]:
    """Yield the classes that the package defines."""
    for info in pkgutil.walk_packages(lit_align.__path__, "lit_align."):
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and not kind.__name__.startswith("_"):
                yield kind


def is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "lit_align"


def depth(kind: type) -> int:
    """Return the length of a class's longest chain down to one class of another library."""
    if not is_own(kind):
        return int(kind is not object)
    return 1 + max(depth(base) for base in kind.__bases__)


def test_inheritance_is_at_most_six_deep():
    deep = {kind.__name__: depth(kind) for kind in public_classes() if depth(kind) > MAX_DEPTH}
    assert not deep


def test_no_class_inherits_from_one_of_ours_by_two_paths():
    for kind in public_classes():
        ancestors = [{each for each in base.__mro__ if is_own(each)} for base in kind.__bases__]
        assert sum(map(len, ancestors)) == len(set().union(*ancestors)), kind.__name__


def test_every_constructor_argument_is_documented():
    missing = []
    for kind in public_classes():
        if "__init__" not in vars(kind) or issubclass(kind, BaseException):
            continue
        doc = inspect.getdoc(kind) or ""
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            plain = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if name != "self" and plain and f"{name}:" not in doc and f"{name}," not in doc:
                missing.append(f"{kind.__name__}.{name}")
    assert not missing

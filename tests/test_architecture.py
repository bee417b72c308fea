"""The house rules that a machine can check: floors, circles, sizes, names."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_align

ROOT = Path(lit_align.__file__).parent
FLOORS = [
    "version errors renamed terminal",
    "batches functional optim configs",
    "models data",
    "algorithms rewards runs",
    "callbacks",
    "tools plan report evaluation",
    "cli",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"]
MODELS = ["sltrain kernels weights", "adapters parallel generation"]  # other modules above
FORBIDDEN = {"utils", "common", "helpers", "misc"}


def module_of(path: Path) -> str:
    """lit_align.models.policy, from its file."""
    return ".".join(["lit_align", *path.relative_to(ROOT).with_suffix("").parts])


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, plain or relative, at the top or late."""
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
                is_room = found is not None and found.submodule_search_locations is not None
                yield from (parts if is_room and node.module is None else [module])


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_room_imports_itself_and_lower_floors(path):
    here = room(module_of(path))
    for module in imports(path):
        there = room(module)
        assert there == here or FLOOR[there] < FLOOR[here], f"{here} may not import {there}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_fit_a_reader(path):
    source = path.read_text()
    assert source.count("\n") < 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length < 40, f"{node.name} is longer than a screen"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_file_says_why_it_exists_and_has_a_name_of_its_own(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert not FORBIDDEN & set(path.relative_to(ROOT).with_suffix("").parts)


def test_packages_hold_no_code():
    for path in ROOT.rglob("__init__.py"):
        assert path.read_text() == "", path


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


@pytest.mark.parametrize("path", sorted((ROOT / "models").rglob("*.py")), ids=named)
def test_folders_of_models_import_themselves_and_lower_ones(path):
    floor = {name: number for number, names in enumerate(MODELS) for name in names.split()}
    here = module_of(path).split(".")[2]
    for module in imports(path):
        parts = module.split(".")
        if here in floor and parts[1] == "models" and parts[2] != here:
            assert floor.get(parts[2], len(MODELS)) < floor[here], f"{here} may not import {module}"


def test_functional_knows_torch_only():
    for path in sorted((ROOT / "functional").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in {"torch", "typing", "collections", "math"}


def public_classes() -> Iterator[type]:
    for info in pkgutil.walk_packages(lit_align.__path__, "lit_align."):
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and not kind.__name__.startswith("_"):
                yield kind


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

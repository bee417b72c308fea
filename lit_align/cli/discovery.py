"""Imports whatever a config may name, so that short class names work without a registry."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

ROOMS = ("algorithms", "models", "data", "rewards", "callbacks")


def open_rooms() -> None:
    """Import every module of the folders whose classes a config may name."""
    for room in ROOMS:
        package = importlib.import_module(f"lit_align.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def kinds(base: type) -> Iterator[type]:
    """All subclasses of `base` that can be built, whoever wrote them."""
    subclasses: list[type] = base.__subclasses__()
    for kind in subclasses:
        if not inspect.isabstract(kind):
            yield kind
        yield from kinds(kind)


def arguments(kind: type) -> set[str]:
    """Names that the constructors of `kind` and of its parents take."""
    builders = [vars(parent)["__init__"] for parent in kind.__mro__ if "__init__" in vars(parent)]
    names = {name for builder in builders[:-1] for name in inspect.signature(builder).parameters}
    return names - {"self", "args", "kwargs"}

"""Import every class that a config may name, so that short class names work without a registry."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

FOLDERS = ("algorithms", "models", "data", "rewards", "callbacks")


def import_all() -> None:
    """Import every module of the folders whose classes a config may name."""
    for folder in FOLDERS:
        package = importlib.import_module(f"lit_align.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def module_of(class_path: str) -> ModuleType | None:
    """Import and return the module of an import path, or return None if there is no such module.

    An import that fails inside of the module raises its error: the user must see that line.

    Args:
        class_path: Import path of a class, such as my_module.MyClass.
    """
    name = class_path.rpartition(".")[0]
    if not name or name.startswith("."):
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):  # the module itself or a package above it
            return None
        raise


def concrete_subclasses(base: type) -> Iterator[type]:
    """Yield all subclasses of `base` that are not abstract, including a user's own."""
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        if not inspect.isabstract(subclass):
            yield subclass
        yield from concrete_subclasses(subclass)


def init_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters that the constructors of `cls` and of its parents take.

    The `**kwargs` of a constructor are assumed to go to its parent's constructor.
    """
    constructors = [
        vars(parent)["__init__"] for parent in cls.__mro__ if "__init__" in vars(parent)
    ]
    found: dict[str, inspect.Parameter] = {}
    for builder in constructors[:-1]:
        parameters = inspect.signature(builder).parameters.values()
        for each in parameters:
            if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and each.name != "self":
                found.setdefault(each.name, each)
    return found


def init_arguments(cls: type) -> set[str]:
    """Return the names that the constructors of `cls` and of its parents take."""
    return set(init_parameters(cls))

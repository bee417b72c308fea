"""Find the first wrong setting of a command line, and describe what is wrong with it.

jsonargparse lists the errors of all types it tried. Here each setting is checked once, against the
constructor of its class.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Callable as AbstractCallable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.cli.discovery import concrete_subclasses, init_arguments, module_of
from lit_align.data.base import TextDataModule
from lit_align.renamed import renamed_class, renamed_key

Tree = dict[str, Any]  # settings by name; a class's arguments are next to its `class_path`
SECTIONS: dict[str, type] = {
    "model": Algorithm,
    "data": TextDataModule,
    "trainer": Trainer,
    "rollout": Rollout,
    "reward": Reward,
}
REQUIRED = ("model", "data")
MAX_CLASSES = 12  # classes that a message lists
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def find_mistake(words: Sequence[str], known: set[str]) -> str | None:
    """Return a sentence about the first wrong setting, or None if none is found.

    Args:
        words: The command line, its configs given as YAML text.
        known: First parts of all keys that the command has.
    """
    tree = settings_tree(words)
    for section, value in tree.items():
        if section not in known:
            return unknown_key(f"--{section}", "This command", section, known)
        if section in SECTIONS:
            mistake = next(class_mistakes(f"--{section}", SECTIONS[section], value), None)
            if mistake is not None:
                return mistake
    missing = [section for section in REQUIRED if section in known and section not in tree]
    if missing:
        return f"There is no {missing[0]} section. Use --config NAME (see lit-align configs list)."
    return None


def settings_tree(words: Sequence[str]) -> Tree:
    """Return the settings of a command line; a later one replaces an earlier one.

    Args:
        words: The command line, its configs given as YAML text.
    """
    tree: Tree = {}
    pairs = zip(words, [*words[1:], "--"], strict=True)
    for word, following in pairs:
        if not word.startswith("-") or word in ("-", "--"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = "true" if following.startswith("--") else following
        if name in ("config", "c"):
            merge(tree, yaml.safe_load(value) or {})
        else:
            *path, last = name.split(".")
            merge(tree, nest(path, {last.rstrip("+"): read_value(value)}))
    return tree


def nest(path: list[str], value: Tree) -> Tree:
    """Return `value` below the keys of `path`, without `init_args`."""
    for key in reversed([key for key in path if key != "init_args"]):
        value = {key: value}
    return value


def read_value(text: str) -> Any:
    """Return a mapping or list that is written as YAML, and any other text as it is."""
    if not text.startswith(("{", "[")):
        return None if text == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def merge(tree: Tree, settings: Tree) -> None:
    """Merge settings into a tree; `init_args` are put next to their `class_path`.

    Args:
        tree: Changed in place.
        settings: Nested; a text in the place of a class's settings is its name.
    """
    for key, value in settings.items():
        if key == "init_args" and isinstance(value, dict):
            merge(tree, value)
        elif isinstance(value, dict):
            before = tree.get(key)
            node = before if isinstance(before, dict) else {}
            if isinstance(before, str):
                node["class_path"] = before
            if "class_path" in value and value["class_path"] != node.get("class_path"):
                node = {}  # jsonargparse drops arguments that the new class does not have
            tree[key] = node
            merge(node, value)
        elif isinstance(tree.get(key), dict) and isinstance(value, str):
            tree[key] = {"class_path": value}
        else:
            tree[key] = value


def class_mistakes(key: str, base: type, value: Any) -> Iterator[str]:
    """Yield a sentence for each wrong setting of a class.

    Args:
        key: Its flag, such as --model.policy.
        base: The class, or a parent of those that may be named.
        value: A class's name, or its settings.
    """
    settings = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(settings, dict):
        return
    node: Tree = {}
    merge(node, settings)  # an entry of a list still has its `init_args`
    name = node.get("class_path")
    cls = base if name is None else resolve_class(base, str(name))
    if cls is None:
        yield unknown_class(key, base, str(name))
        return
    hints = type_hints(cls)
    for argument, given in node.items():
        if argument in ("class_path", "dict_kwargs"):
            continue
        if argument not in init_arguments(cls):
            yield unknown_key(f"{key}.{argument}", cls.__name__, argument, init_arguments(cls))
        elif argument in hints:
            yield from value_mistakes(f"{key}.{argument}", hints[argument], given)


def value_mistakes(key: str, hint: Any, value: Any) -> Iterator[str]:
    """Yield a sentence if a value does not fit its type, or for each mistake inside of it.

    Args:
        key: Its flag.
        hint: Its annotation.
        value: As given.
    """
    classes = list(classes_in(hint))
    named = isinstance(value, dict) or (isinstance(value, str) and not fits(hint, value))
    if classes and named:
        name = value if isinstance(value, str) else value.get("class_path")
        bases = [base for base in classes if name is None or resolve_class(base, str(name))]
        yield from class_mistakes(key, (bases or classes)[0], value)
    elif classes and isinstance(value, list):
        for number, each in enumerate(value):
            yield from class_mistakes(f"{key}[{number}]", classes[0], each)
    elif not fits(hint, value):
        yield f"{key} must be {describe(hint)}, found {value!r}."


def fits(hint: Any, value: Any) -> bool:
    """Return True if jsonargparse takes a value for an annotation."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:  # a type that jsonargparse has no parser for: it takes any value
        return True
    try:
        parser.parse_object({"value": value})
    except Exception:  # jsonargparse raises what any constructor or type raises
        return False
    return True


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes of an annotation whose settings are given by `class_path`."""
    origin = get_origin(hint)
    if origin is AbstractCallable:
        yield from classes_in(get_args(hint)[-1])
    elif origin in (typing.Union, types.UnionType, list, typing.Annotated):
        for each in get_args(hint):
            yield from classes_in(each)
    elif isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "datetime"):
        yield hint


def type_hints(cls: type) -> dict[str, Any]:
    """Return the annotations of all constructor arguments of a class and of its parents."""
    hints: dict[str, Any] = {}
    for parent in reversed(cls.__mro__):
        if "__init__" in vars(parent) and parent is not object:
            try:
                hints |= get_type_hints(vars(parent)["__init__"])
            except (NameError, TypeError):  # annotations of a library under TYPE_CHECKING
                continue
    return hints


def resolve_class(base: type, name: str) -> type | None:
    """Return the class with this short name or import path, or None.

    Args:
        base: A parent of the class.
        name: As given.
    """
    short = name.rpartition(".")[2]
    if short == name:
        return {cls.__name__: cls for cls in (base, *concrete_subclasses(base))}.get(name)
    found = getattr(module_of(name), short, None)
    return found if isinstance(found, type) else None


def unknown_class(key: str, base: type, name: str) -> str:
    """Return a sentence about a class that is not there.

    Args:
        key: Flag of the setting that names the class.
        base: A parent of the classes that may be named.
        name: Short name or import path, as given.
    """
    if (sentence := renamed_class(name)) is not None:
        return f"{key}: {sentence}"
    module, _, short = name.rpartition(".")
    if module and module_of(name) is None:
        return f"{key} {name}: No module named '{module}' in this folder or in Python's path."
    known = sorted({cls.__name__ for cls in concrete_subclasses(base)})
    hint = did_you_mean(short, known) or f" Use one of {', '.join(known[:MAX_CLASSES])}."
    return f"{key} {name}: there is no such class.{hint}"


def unknown_key(key: str, owner: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence about a key that is not there.

    Args:
        key: Full flag, such as --model.kl_cof.
        owner: Class or section that was searched.
        name: The last part of the key.
        known: What the owner has.
    """
    known = set(known)
    if (sentence := renamed_key(key, known)) is not None:
        return sentence
    return f"{key}: {owner} has no setting '{name}'.{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'X'?` for the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def describe(hint: Any) -> str:
    """Describe a type for a message: `a number or null`."""
    if hint is None or hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        choices = [each for each in get_args(hint) if get_origin(each) is Literal]
        words = [describe(each) for each in get_args(hint) if each not in choices]
        merged = dict.fromkeys(choice for each in choices for choice in get_args(each))
        words += ["one of " + ", ".join(map(str, merged))] if merged else []
        return " or ".join(dict.fromkeys(words))
    if get_origin(hint) in (list, tuple, Sequence):
        return f"a list of {describe(get_args(hint)[0])}" if get_args(hint) else "a list"
    if get_origin(hint) is dict:
        return "a mapping"
    if get_origin(hint) is Callable:
        return describe(get_args(hint)[-1])
    return TYPE_NAMES.get(hint) or f"a {getattr(hint, '__name__', hint)}"

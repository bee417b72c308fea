"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a file under another name first; where that fails nothing is left of it.

    Args:
        path: Its name; its folder exists.
        text: What is to be in it.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`; what is in it at the end goes there, over what has its name.

    Where something fails inside, it is deleted and `target` stays as it was.

    Args:
        target: The folder that is meant.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        target.mkdir(parents=True, exist_ok=True)
        for found in part.iterdir():
            if found.is_dir():
                shutil.rmtree(target / found.name, ignore_errors=True)
            found.replace(target / found.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)

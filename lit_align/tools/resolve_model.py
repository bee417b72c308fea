"""Which folder is meant by a run, an export, or an export of several roles."""

from pathlib import Path

from lit_align.errors import UserError

SUBFOLDERS = ("", "policy", "hf", "hf/policy")


def resolve_model(path: str) -> str:
    """The folder that transformers or peft loads, or the hub id as it is.

    Args:
        path: Of weights, of a run folder, or of its `hf`; with several roles the policy is meant.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    for name in SUBFOLDERS:
        candidate = folder / name
        if any((candidate / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(candidate)
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path}: no config.json and no adapter_config.json, there or in hf/, so no model is "
        f"saved there. Found: {names}."
    )

"""Which folder is meant by a run, an export, or an export of several roles."""

from pathlib import Path

INSIDE = ("", "policy", "hf", "hf/policy")


def found_model(path: str) -> str:
    """The folder that transformers or peft loads, or the hub id as it is.

    Args:
        path: Of weights, of a run folder, or of its `hf`; with several roles the policy is meant.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    for name in INSIDE:
        place = folder / name
        if any((place / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(place)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path}: no config.json and no adapter_config.json, there or in hf/, so no model is "
        f"saved there. Found: {found}."
    )

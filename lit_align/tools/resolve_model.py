"""Find the model of a run folder, of an export, or of an export of several roles."""

from pathlib import Path

from lit_align.errors import UserError

SUBFOLDERS = ("", "policy", "hf", "hf/policy")  # of an export and of a run, in this order


def resolve_model(path: str) -> str:
    """Return the folder that transformers or peft loads; a hub id is returned unchanged.

    Args:
        path: Folder of weights, run folder, its `hf`, or hub id. An export of several roles
            stands for its policy.

    Example:
        >>> resolve_model("Qwen/Qwen2.5-0.5B")
        'Qwen/Qwen2.5-0.5B'
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
        f"{path}: no config.json and no adapter_config.json in the folder or in its hf/. Give a "
        f"folder with a saved model. Found: {names}."
    )

"""Names of version 0.1 and what they are called now. This table is kept for one version.

An old config key, flag, class, config or log key is answered by one sentence with the new name.
"""

KEYS = {  # last part of a setting's flag
    "warmup": "warmup_ratio",
}
LOCAL_KEYS: dict[str, str] = {  # whole flags whose last part is still a key elsewhere
}
FLAGS = {  # (command, flag): what to do now
    ("fit", "--plan"): "`fit --plan` was removed. Run `lit-align plan` with the same arguments.",
}
CLASSES: dict[str, str] = {}
MODULES: dict[str, str] = {}
CONFIGS = {"dl_ppo": "dynamic_lora_ppo", "states8": "adamw_8bit"}
LOG_KEYS: dict[str, str | None] = {}


def renamed_key(key: str) -> str | None:
    """Return a sentence if a setting has the name of version 0.1, else None.

    Args:
        key: The whole flag, such as --model.warmup.

    Example:
        >>> renamed_key("--model.warmup")
        'warmup was renamed to warmup_ratio. Use --model.warmup_ratio.'
        >>> renamed_key("--model.kl_coef") is None
        True
    """
    head, _, old = key.rpartition(".")
    new = LOCAL_KEYS.get(key) or KEYS.get(old)
    return None if new is None else f"{old} was renamed to {new}. Use {head}.{new}."


def renamed_flag(command: str, flag: str) -> str | None:
    """Return a sentence if a command's flag has the name of version 0.1, else None.

    Args:
        command: Such as plan.
        flag: With its dashes.
    """
    return FLAGS.get((command, flag))


def renamed_class(name: str) -> str | None:
    """Return a sentence if a class has the name or the module of version 0.1, else None.

    Args:
        name: Short name or import path.
    """
    module, _, short = name.rpartition(".")
    new = CLASSES.get(short, short)
    if new == short and module not in MODULES:
        return None
    path = f"{MODULES.get(module, module)}.{new}" if module else new
    return f"{name} was renamed to {path}. Use {path}."


def renamed_log_key(name: str) -> str | None:
    """Return a sentence if a logged metric has the name of version 0.1, else None."""
    split, _, rest = name.partition("val/") if name.startswith("val/") else ("", "", name)
    prefix = "val/" if name.startswith("val/") and name not in LOG_KEYS else split
    old = name if name in LOG_KEYS else rest
    if old not in LOG_KEYS:
        return None
    new = LOG_KEYS[old]
    return (
        f"{name} is no longer logged." if new is None else f"{name} was renamed to {prefix}{new}."
    )

"""Checks of an algorithm's arguments. Each refusal names the value found and the flag to set."""

from collections.abc import Sequence

from lit_align.errors import UserError


def check_above_zero(**settings: float | None) -> None:
    """Refuse a setting that is 0, negative or NaN. None is accepted.

    Args:
        **settings: Values by the name of the setting.

    Example:
        >>> check_above_zero(beta=0.1, critic_lr=None)
        >>> check_above_zero(beta=0.0)
        Traceback (most recent call last):
        ...
        lit_align.errors.UserError: beta must be above 0, found 0.0. Set --model.beta.
    """
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, found {value}. Set --model.{name}.")


def check_at_least(minimum: int, **settings: float | None) -> None:
    """Refuse a setting below the minimum. None is accepted.

    Args:
        minimum: Smallest value that is accepted.
        **settings: Values by the name of the setting.
    """
    for name, value in settings.items():
        if value is not None and value < minimum:
            raise UserError(
                f"{name} must be at least {minimum}, found {value}. Set --model.{name}."
            )


def check_fraction(**settings: float) -> None:
    """Refuse a setting that is not between 0 and 1.

    Args:
        **settings: Values by the name of the setting.

    Example:
        >>> check_fraction(gamma=1.5)
        Traceback (most recent call last):
        ...
        lit_align.errors.UserError: gamma must be between 0 and 1, found 1.5. Set --model.gamma.
    """
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be between 0 and 1, found {value}. Set --model.{name}.")


def check_choice(choices: Sequence[str], **settings: object) -> None:
    """Refuse a setting that is not one of several words. The command line checks this itself.

    Args:
        choices: The words.
        **settings: Values by the name of the setting.

    Example:
        >>> check_choice(("max", "min"), mode=True)
        Traceback (most recent call last):
        ...
        lit_align.errors.UserError: mode must be max or min, found True. Set --model.mode.
    """
    for name, value in settings.items():
        if value not in choices:
            words = " or ".join(choices)
            raise UserError(f"{name} must be {words}, found {value}. Set --model.{name}.")


def check_group_size(algorithm: object, num_samples: int) -> None:
    """Refuse a group of one response, whose score cannot be compared with another.

    Args:
        algorithm: The algorithm, for the message.
        num_samples: G, responses per prompt.
    """
    if num_samples < 2:
        raise UserError(
            f"num_samples must be at least 2 for {type(algorithm).__name__}, which compares the "
            f"responses to a prompt, found {num_samples}. Set --model.num_samples."
        )

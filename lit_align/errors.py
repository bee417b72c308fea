"""The error for mistakes of a user. This module imports nothing."""


class UserError(ValueError):
    """A mistake in a command, a config, a file or a setting that the user can correct.

    The command line prints its message as a sentence and no traceback. Any other exception keeps
    its traceback. The message says what is wrong, the value found, and what to set.

    Example:
        >>> raise UserError("gamma must be between 0 and 1, found 1.5. Set --model.gamma.")
        Traceback (most recent call last):
        ...
        lit_align.errors.UserError: gamma must be between 0 and 1, found 1.5. Set --model.gamma.
    """

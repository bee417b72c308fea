"""Text of models and data that is printed on a terminal."""


def strip_control_characters(text: str) -> str:
    r"""Return the text without characters that control a terminal: escapes, bells, directions.

    Args:
        text: Text of a model, a data set or a file name. Line breaks and tabs are kept.

    Example:
        >>> strip_control_characters("red\x1b[31m, one bell\a")
        'red[31m, one bell'
    """
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")

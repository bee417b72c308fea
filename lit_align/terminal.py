"""Text of models and data on a terminal."""


def strip_control_characters(text: str) -> str:
    """The text without what could steer a terminal: escapes, bells, turns of direction.

    Args:
        text: From a model, a data set or a file's name; lines and tabs stay.
    """
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")

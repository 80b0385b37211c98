"""Text for a terminal."""

from __future__ import annotations


def escape_control_characters(text: str) -> str:
    r"""Returns a text for a terminal, in which control characters have the form `\x1b`.

    Names in files can contain commands to the terminal. Line breaks and tabs are kept.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
        for letter in text
    )

"""What docstrings say, for help texts and schemas: it is written once."""

from __future__ import annotations

import inspect
import re


def parse_attribute_docs(cls: type) -> dict[str, str]:
    """What the "Attributes:" of a class, and of those it is built on, say of each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")[2]
        # It ends at the next line that is not indented.
        body = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n(?= {4}\S)", "\n" + body):
            name, colon, text = entry.strip().partition(":")
            # "As in ..." refers to what a class before says.
            if colon and name.isidentifier() and not text.lstrip().startswith("As in"):
                found[name] = " ".join(text.split())
    return found

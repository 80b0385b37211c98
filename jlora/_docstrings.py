"""Attribute documentation parsed from docstrings, for help texts and schemas."""

from __future__ import annotations

import inspect
import re


def parse_attribute_docs(cls: type) -> dict[str, str]:
    """Returns the text of each attribute in the `Attributes:` section of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")[2]
        # The section ends at the next line that is not indented.
        body = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n(?= {4}\S)", "\n" + body):
            name, colon, text = entry.strip().partition(":")
            # "As in ..." refers to the text of a base class.
            if colon and name.isidentifier() and not text.lstrip().startswith("As in"):
                docs[name] = " ".join(text.split())
    return docs

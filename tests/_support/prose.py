"""Counts words in docstrings, comments and pages: `python tests/_support/prose.py README.md`."""

from __future__ import annotations

import ast
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterable
from typing import NamedTuple

WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
SAY = re.compile(r"\b(say|says|said|tell|tells|told)\b", re.IGNORECASE)


class Prose(NamedTuple):
    """Docstrings and comments of Python files, and the text of Markdown files.

    Attributes:
        words: Number of words.
        what: Places of the word "what", as file:line.
        say: Places of "say", "tell" and their forms.
    """

    words: int
    what: list[str]
    say: list[str]

    def per_thousand(self, places: list[str]) -> float:
        return 1000 * len(places) / max(self.words, 1)


def texts(source: str) -> Iterable[tuple[int, str]]:
    """The docstrings and comments of a file, with the line that each begins on."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            constant = node.body[0].value  # type: ignore[attr-defined]
            yield constant.lineno, constant.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:")):
            yield token.start[0], token.string.lstrip("#")


def page_texts(source: str) -> Iterable[tuple[int, str]]:
    """The lines of a Markdown file outside of code blocks, with their numbers."""
    in_code = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def read(files: Iterable[pathlib.Path]) -> Prose:
    words, what, say = 0, [], []
    for file in sorted(files):
        parts = page_texts if file.suffix == ".md" else texts
        for first, text in parts(file.read_text(encoding="utf-8")):
            words += len(re.findall(r"\w+", text))
            for number, line in enumerate(text.splitlines(), first):
                what += [f"{file}:{number}: {line.strip()}"] * len(WHAT.findall(line))
                say += [f"{file}:{number}: {line.strip()}"] * len(SAY.findall(line))
    return Prose(words, what, say)


if __name__ == "__main__":
    paths = [pathlib.Path(path) for path in sys.argv[1:]]
    found = read(f for p in paths for f in ([p] if p.is_file() else p.rglob("*.[pm][yd]")))
    print(*found.what, *found.say, sep="\n")
    what, say = found.per_thousand(found.what), found.per_thousand(found.say)
    print(f"{found.words} words: what {what:.2f}, say/tell {say:.2f} per 1,000")

"""Docstrings and comments are in the field's plain words."""

from __future__ import annotations

import pathlib

from _support import prose

import jlora

ROOT = pathlib.Path(jlora.__file__).parent


def test_prose_counts_words_in_text_alone() -> None:
    source = '"""What a file is."""\nx = "what"  # Says what it is.\n\n\ndef f():\n    "told"\n'
    assert [text for _, text in prose.texts(source)] == [
        "What a file is.",
        "told",
        " Says what it is.",
    ]
    assert len(prose.WHAT.findall("What is what? Somewhat.")) == 2
    assert len(prose.SAY.findall("It says, tells and told; storytelling does not.")) == 3


def test_prose_is_plain() -> None:
    found = prose.read(ROOT.rglob("*.py"))
    assert found.words > 20_000  # It has read the package.
    assert found.per_thousand(found.what) <= 2, "\n".join(found.what)
    assert found.per_thousand(found.say) <= 0.3, "\n".join(found.say)

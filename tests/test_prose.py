"""Docstrings, comments and pages are in the field's plain words."""

from __future__ import annotations

import pathlib

import pytest
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


def test_prose_counts_pages_without_code() -> None:
    page = "What is it?\n```python\nwhat = 1\n```\nIt says so.\n"
    assert list(prose.page_texts(page)) == [(1, "What is it?"), (5, "It says so.")]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param([*ROOT.rglob("*.py")], 20_000, id="package"),
        pytest.param([ROOT.parent / "README.md"], 5_000, id="readme"),
        pytest.param([*(ROOT.parent / "docs").rglob("*.md")], 500, id="docs"),
    ],
)
def test_prose_is_plain(files: list[pathlib.Path], words: int) -> None:
    found = prose.read(files)
    assert found.words > words  # It has read the files.
    assert found.per_thousand(found.what) <= 2, "\n".join(found.what)
    assert found.per_thousand(found.say) <= 0.3, "\n".join(found.say)

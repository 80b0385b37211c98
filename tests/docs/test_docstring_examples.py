"""Every public function and class has an example, and it runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pathlib
from typing import Any

import pytest

import jlora

ROOT = pathlib.Path(jlora.__file__).parent
CLOSED = {"jlora.interpreter", "jlora.cli", "jlora.models.hf"}
PACKAGES = [
    ".".join(path.parent.relative_to(ROOT.parent).parts)
    for path in sorted(ROOT.rglob("__init__.py"))
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_members() -> dict[str, Any]:
    """Public functions and classes by their full names, each once."""
    found: dict[int, tuple[str, Any]] = {}
    for package in (name for name in PACKAGES if name not in CLOSED):
        module = importlib.import_module(package)
        for name in module.__all__:
            member = getattr(module, name)
            if inspect.isfunction(member) or inspect.isclass(member):
                found.setdefault(id(member), (f"{package}.{name}", member))
    return dict(found.values())


MEMBERS = public_members()


def examples(member: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(member) or "")


def test_public_names_have_examples() -> None:
    assert not [name for name, member in MEMBERS.items() if not examples(member)]


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if examples(member)])
def test_example_runs(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    member = MEMBERS[name]
    text = inspect.getdoc(member) or ""
    # With the names of the member's module, as `pytest --doctest-modules` does.
    globs = {**vars(inspect.getmodule(member)), "jlora": jlora}
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    output: list[str] = []
    runner.run(parser.get_doctest(text, globs, name, None, 0), out=output.append)
    assert not runner.failures, "".join(output)

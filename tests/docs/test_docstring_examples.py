"""Every public function and class has an example, and it runs."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

import jlora

ROOT = pathlib.Path(jlora.__file__).parent
CLOSED = {"jlora.interpreter", "jlora.cli", "jlora.models.hf"}
PACKAGES = [
    ".".join(path.parent.relative_to(ROOT.parent).parts)
    for path in sorted(ROOT.rglob("__init__.py"))
]
# Names that examples import from a module because no package exports them.
NO_PUBLIC_PATH = {
    "jlora.rules.trace_weights",
    "jlora.training.recipe.sections.DistributedSection",
}
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


def tree_of(member: Any) -> ast.Module:
    return ast.parse("".join(example.source for example in examples(member)))


def unbound_names(tree: ast.Module) -> set[str]:
    """The names that a program reads and nowhere binds."""
    loaded: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return loaded - bound


def module_imports(tree: ast.Module) -> Iterator[str]:
    """The names of jlora that a program imports from elsewhere than a package's `__all__`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jlora"):
            public = importlib.import_module(node.module).__all__ if node.module in PACKAGES else ()
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if alias.name not in public and name not in PACKAGES:
                    yield name


def test_public_names_have_examples() -> None:
    assert not [name for name, member in MEMBERS.items() if not examples(member)]


def test_examples_import_their_names() -> None:
    # Examples that need a download or another package are skipped, and are read here.
    unbound = {name: unbound_names(tree_of(member)) for name, member in MEMBERS.items()}
    assert not {name: names for name, names in unbound.items() if names}


def test_examples_import_public_names() -> None:
    found = {name for member in MEMBERS.values() for name in module_imports(tree_of(member))}
    assert found == NO_PUBLIC_PATH


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if examples(member)])
def test_example_runs(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    member = MEMBERS[name]
    text = inspect.getdoc(member) or ""
    # As in a new session, so that a reader can paste the example.
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    output: list[str] = []
    runner.run(parser.get_doctest(text, {}, name, None, 0), out=output.append)
    assert not runner.failures, "".join(output)

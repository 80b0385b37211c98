"""One word, one meaning: names are defined once, and are those that a reader would search for."""

from __future__ import annotations

import ast
import collections
import pathlib

import jlora

ROOT = pathlib.Path(jlora.__file__).parent
TESTS = pathlib.Path(__file__).parent
# Names of PEFT, transformers and Flax that mean the same in each package that has them.
HOMONYMS = {"load", "save", "Attention", "Block", "Embeddings", "Mlp"}
# Terms of the field.
GERUNDS = {
    "checkpointing",
    "packing",
    "parallel_training",
    "routing",
    "sharding",
    "weight_mapping",
}


def definitions(path: pathlib.Path) -> list[ast.stmt]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]


def test_names_are_defined_in_one_module() -> None:
    modules = collections.defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for node in definitions(path):
            modules[node.name].add(str(path.relative_to(ROOT)))  # type: ignore[attr-defined]
    twice = {name: sorted(paths) for name, paths in modules.items() if len(paths) > 1}
    assert set(twice) <= HOMONYMS, {n: p for n, p in twice.items() if n not in HOMONYMS}


def test_modules_are_nouns() -> None:
    assert {path.stem for path in ROOT.rglob("*ing.py")} == GERUNDS


def test_errors_end_in_error() -> None:
    errors = [
        node.name
        for path in ROOT.rglob("*.py")
        for node in definitions(path)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]
    # It is no fault of the run, as KeyboardInterrupt is none.
    assert [name for name in errors if not name.endswith("Error")] in ([], ["TrainingInterrupted"])


def test_tests_have_short_names() -> None:
    long, twice = [], []
    for path in TESTS.rglob("test_*.py"):
        names = [
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        long += [f"{path.relative_to(TESTS)}::{name}" for name in names if len(name) > 45]
        counts = collections.Counter(names)
        twice += [f"{path.relative_to(TESTS)}::{name}" for name in names if counts[name] > 1]
    assert not long, "\n".join(long)
    assert not twice

"""The layout: imports point one way, `import jlora` is light, public things are documented."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jlora

ROOT = pathlib.Path(jlora.__file__).parent
# What a part may import of the package; parts further down may import all of those above.
ALLOWED = {
    "faithful": set(),
    "kernels": set(),
    "splitting": set(),
    "packed": {"splitting"},
    "tree": {"packed"},
    "factored": {"tree", "faithful", "kernels", "splitting", "packed"},
    "adapters": {"tree", "factored", "packed"},
    "quantization": {"tree", "factored", "adapters", "packed"},
    "explanation": {"factored"},
    "tracing": {"tree", "factored"},
    "assigning": {"tree", "factored", "adapters", "tracing"},
    "transform": {
        "tree",
        "factored",
        "adapters",
        "packed",
        "explanation",
        "tracing",
        "assigning",
    },
    "nnx": {"tree"},
    "optim": {"tree", "factored", "adapters", "transform"},
    "checkpoints": {
        "tree",
        "factored",
        "adapters",
        "transform",
        "splitting",
        "packed",
        "quantization",
    },
    "models": {"tree", "faithful", "kernels", "packed", "quantization", "transform", "checkpoints"},
    "peft": {"tree", "factored", "adapters", "packed", "assigning", "checkpoints", "models"},
    "diffusion": {"tree", "factored", "adapters", "assigning", "checkpoints", "peft"},
    "deltas": {"tree", "factored", "adapters", "packed"},
    "merging": {"tree", "factored", "adapters", "packed", "transform", "deltas", "checkpoints"},
    "inspection": {"checkpoints", "models", "peft"},
    "multi": {
        "tree",
        "factored",
        "adapters",
        "packed",
        "transform",
        "deltas",
        "checkpoints",
        "merging",
    },
    "ranks": {
        "documentation",
        "tree",
        "factored",
        "adapters",
        "packed",
        "assigning",
        "transform",
        "deltas",
        "conversion",
        "calibration",
        "optim",
        "checkpoints",
        "models",
        "training",
    },
    "documentation": set(),
    "cli": {
        "documentation",
        "transform",
        "checkpoints",
        "models",
        "peft",
        "inspection",
        "merging",
        "multi",
        "ranks",
        "adapters",
        "training",
        "planning",
    },
    "conversion": {"tree", "factored", "adapters", "packed", "transform", "deltas"},
    "calibration": {"tree", "factored", "adapters", "transform"},
    "training": {
        "documentation",
        "tree",
        "factored",
        "adapters",
        "packed",
        "quantization",
        "transform",
        "checkpoints",
        "models",
        "peft",
        "optim",
        "merging",
        "conversion",
    },
}
ALLOWED["planning"] = ALLOWED["training"] | {"training", "kernels"}


def imports(file: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("file", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(file: pathlib.Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(file):
        assert not name.startswith("jax._src"), name
        if name.startswith("jlora."):
            other = name.split(".")[1]
            assert other == part or other in ALLOWED[part], f"{part} imports {other}"


def test_reading_data_needs_no_device() -> None:
    for file in (ROOT / "training" / "data").glob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] in ("jax", "flax")], file


def test_only_two_files_depend_on_the_release_of_jax() -> None:
    for file in MODULES:
        uses = [name for name in imports(file) if name.startswith("jax.extend")]
        # The one looks into programs, the other puts an operation into them.
        assert not uses or file.name in ("releases.py", "operation.py"), (file, uses)


def test_import_jlora_is_light() -> None:
    heavy = ["datasets", "orbax", "transformers", "torch", "tokenizers", "matplotlib", "flax.nnx"]
    script = f"import sys, jlora; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_everything_public_says_what_it_is() -> None:
    names = [name for name in vars(jlora) if not name.startswith("_")]
    for name in names:
        thing = getattr(jlora, name)
        if inspect.ismodule(thing):
            continue
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            # Every argument is annotated.
            parameters = inspect.signature(thing).parameters.values()
            assert all(p.annotation is not inspect.Parameter.empty for p in parameters), name


def test_no_file_leaves_work_undone() -> None:
    for file in [
        *MODULES,
        *ROOT.parent.glob("examples/*.py"),
        *ROOT.parent.glob("benchmarks/**/*.py"),
    ]:
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", file.read_text()), file

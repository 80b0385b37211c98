"""The layout: imports point one way, `import jlora` is light, and packages have doors."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import jlora

ROOT = pathlib.Path(jlora.__file__).parent
REPOSITORY = ROOT.parent
# Each part of the package may import those above it.
ORDER = [
    "_docstrings",
    "_mesh",
    "_serialization",
    "_validation",
    "kernels",
    "_quantized_array",
    "_tree",
    "interpreter",
    "initializers",
    "adapters",
    "_delta",
    "quantization",
    "rules",
    "explain",
    "transform",
    "convert",
    "nnx",
    "optim",
    "checkpoints",
    "merging",
    "multi_lora",
    "models",
    "peft",
    "diffusers",
    "training",
    "importance",
    "planning",
    "rank_search",
    "cli",
]
# The two files of the top door import everything.
MODULES = sorted({*ROOT.rglob("*.py")} - {ROOT / "__init__.py", ROOT / "_api.py"})


def imports(source: str) -> Iterator[str]:
    """The dotted names that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        above = ORDER[: ORDER.index(part_of(path)) + 1]
        for name in imports(path.read_text()):
            parts = name.split(".")
            if parts[0] == "jlora" and len(parts) > 1 and parts[1] not in above:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_imports_use_public_jax_only() -> None:
    # One file looks into traced programs, the other defines primitives.
    extend = ("_compat.py", "_primitive.py")
    wrong = []
    for path in MODULES:
        private = ("jax._src",) if path.name in extend else ("jax._src", "jax.extend")
        names = [name for name in imports(path.read_text()) if name.startswith(private)]
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names]
    assert not wrong


def test_data_modules_need_no_device() -> None:
    for path in (ROOT / "training" / "data").glob("*.py"):
        names = {name.split(".")[0] for name in imports(path.read_text())}
        assert not names & {"jax", "flax"}, path


# --- what importing costs -------------------------------------------------------------------------


def loaded_modules(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_jlora_is_light() -> None:
    loaded = loaded_modules("import jlora; jlora.lora_transform")
    heavy = {"datasets", "orbax", "transformers", "torch", "tokenizers", "matplotlib", "pydantic"}
    assert not loaded & {*heavy, "cmaes", "scipy", "flax.nnx"}
    # Every module costs about a millisecond; jax and flax load some 1,000 by themselves.
    assert len([name for name in loaded if name.split(".")[0] == "jlora"]) <= 110


def test_help_imports_neither_jax_nor_numpy() -> None:
    loaded = loaded_modules("import jlora.cli")
    assert not loaded & {"jax", "flax", "numpy", "pydantic", "yaml"}


# --- doors ----------------------------------------------------------------------------------------

PACKAGES = [
    ".".join(path.parent.relative_to(REPOSITORY).parts)
    for path in sorted(ROOT.rglob("__init__.py"))
]
# Packages without a door: users have no reason to import them.
CLOSED = {"jlora.interpreter", "jlora.cli", "jlora.models.hf"}


def exported(package: str) -> set[str]:
    return set(getattr(importlib.import_module(package), "__all__", ()))


def python_blocks(path: pathlib.Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))


def test_users_import_what_a_door_exports() -> None:
    files = [
        REPOSITORY / "README.md",
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "examples").rglob("*.py"),
        *(REPOSITORY / "benchmarks").rglob("*.py"),
    ]
    wrong = []
    for path in files:
        source = python_blocks(path)
        used = set(imports(source)) | set(re.findall(r"\bjlora(?:\.[A-Za-z_]\w*)+", source))
        for name in used:
            if name.split(".")[0] != "jlora" or name in PACKAGES or name == "jlora.initializers":
                continue
            package = max((p for p in PACKAGES if f"{name}.".startswith(f"{p}.")), key=len)
            member = name[len(package) + 1 :].split(".")[0]
            if package in CLOSED or member not in exported(package) | {"initializers"}:
                wrong.append(f"{path.relative_to(REPOSITORY)}: {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_doors_export_what_exists() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = list(getattr(module, "__all__", ()))
        assert package in CLOSED or names, package
        assert len(set(names)) == len(names), package
        assert all(hasattr(module, name) for name in names), package


@pytest.mark.parametrize("package", [name for name in PACKAGES if name not in CLOSED])
def test_public_names_are_documented(package: str) -> None:
    module = importlib.import_module(package)
    for name in exported(package):
        member = getattr(module, name)
        if not (inspect.isfunction(member) or inspect.isclass(member)):
            continue
        assert inspect.getdoc(member), name
        if inspect.isfunction(member):
            parameters = inspect.signature(member).parameters.values()
            assert all(p.annotation is not inspect.Parameter.empty for p in parameters), name


def test_files_leave_no_work_undone() -> None:
    files = [
        *ROOT.rglob("*.py"),
        *REPOSITORY.glob("examples/*.py"),
        *REPOSITORY.glob("benchmarks/**/*.py"),
    ]
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert not [path for path in files if marks.search(path.read_text())]

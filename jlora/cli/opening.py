"""Bases and adapters as commands are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def with_adapter(base: str | Path, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The model, its weights, and the adapter of either format."""
    from jlora import models, peft
    from jlora.checkpoints.adapter_file import load_adapter

    model, params = models.load(base, **layout_of(path), **options)
    if path.is_dir():
        loaded = peft.load(path, model, params)
        return model, loaded.params, loaded.adapter
    return model, params, load_adapter(path, params)


def layout_of(path: Path) -> dict[str, Any]:
    """How the layers lie in the base that an adapter is for: in one stack, or each apart."""
    from jlora.checkpoints.adapter_file import weight_paths

    if path.is_dir():
        return {}
    stacked = any("/layers/" in weight for weight in weight_paths(path))
    return {"scanned": True} if stacked else {}


def check_new(out: Path) -> None:
    """Refuses to write where something is, before the work begins."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is left as it was. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{out.parent} is no folder that {out.name} could be put in. Make it."
        )

"""Going on with a run: what a checkpoint says of the run that it is of, and what may differ."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jlora.training.loop import Progress
from jlora.training.reading import Datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.saving import Saver
from jlora.training.setup import Setup
from jlora.training.step import State

# What a run may not change while it goes on; all else may differ when it is resumed.
_BOUND = ("seed", "lora", "more", "frozen", "optimizer", "preference", "classification")
_VERSIONS = ("jax", "jaxlib", "flax", "optax")


def settled(recipe: Recipe, kept: Path, resume: bool, devices: Sequence[Any]) -> Recipe:
    """The recipe with what it leaves to the day and to the devices; a resumed run has both from
    when it began.

    Chat templates show the day. Layers lie apart on a single GPU, where a scan copies every layer's
    weights out of their stack, and what they keep for the gradient into one.

    Args:
        recipe: Which may leave them open.
        kept: The recipe that the run wrote when it began.
        resume: Whether it did.
        devices: What it runs on.
    """
    began: Any = {"data": {}, "model": {}}
    if resume and kept.is_file():
        began = yaml.safe_load(kept.read_text(encoding="utf-8"))
    data, model = recipe.data, recipe.model
    if data.date is None:
        date = began["data"].get("date") or datetime.date.today().isoformat()
        data = data.model_copy(update={"date": date})
    if model.scanned is None:
        one_gpu = [device.platform for device in devices] == ["gpu"]
        scanned = began["model"].get("scanned") if resume else False if one_gpu else None
        model = model.model_copy(update={"scanned": scanned})
    return recipe.model_copy(update={"data": data, "model": model})


def facts_of(recipe: Recipe, setup: Setup, data: Datasets) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    dumped = recipe.model_dump(mode="json")
    # A checkpoint of before there were quantised bases says nothing of them.
    bound = [*_BOUND, "quantize"] if recipe.quantize is not None else _BOUND
    validation = None if data.validation is None else data.validation.fingerprint
    # Where the state lies changes no number, and earlier checkpoints do not say it.
    dumped["optimizer"].pop("offload")
    return {
        "recipe": {name: dumped[name] for name in bound},
        "numbers": {name: dumped["model"][name] for name in ("dtype", "compute_dtype")},
        "evaluation": {"metric": recipe.training.metric, "data": validation},
        "schedule": {name: dumped["training"][name] for name in ("epochs", "steps")},
        "data": data.train.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "base": setup.fingerprints,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def resumed(
    saver: Saver, setup: Setup, facts: dict[str, Any], allow_changes: bool
) -> tuple[State, Progress]:
    """The state and progress of the last checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another run.
    """
    if not saver.steps():
        raise FileNotFoundError(
            f"{saver.folder} holds no checkpoint to go on from. Begin without --resume."
        )
    restored = saver.restore(setup.state)
    changed = [name for name in facts if facts[name] != restored.facts[name] and name != "versions"]
    if changed and not allow_changes:
        told = [_difference(name, restored.facts[name], facts[name]) for name in changed]
        raise ValueError(
            f"The checkpoint of step {restored.step} in {saver.folder} was made with another "
            f"{'; another '.join(told)}. Resume with what it was made with, or say "
            f"--allow-changes to go on all the same."
        )
    if facts["versions"] != restored.facts["versions"]:
        warnings.warn(
            f"The checkpoint was made with {restored.facts['versions']}, and this is "
            f"{facts['versions']}: the same to the last bit is not to be expected.",
            stacklevel=2,
        )
    progress = Progress.of(restored.facts["progress"])
    if "evaluation" in changed:  # Scores of other kinds cannot be compared.
        progress.best, progress.best_step, progress.worse = -math.inf, None, 0
    return restored.state, progress


def _difference(name: str, old: Any, new: Any) -> str:
    """What changed of one fact, as far as it can be said in a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if name == "base":
            return f"base (the weight {keys[0]!r} has other numbers)"
        parts = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys]
        return f"{name} ({'; '.join(parts)})"
    return name

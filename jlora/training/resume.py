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

from jlora.training.checkpointing import CheckpointManager
from jlora.training.datasets import Datasets
from jlora.training.loop import TrainProgress
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup
from jlora.training.train_step import TrainState

# What a run may not change while it goes on; all else may differ when it is resumed.
_RESUME_CHECKED_FIELDS = (
    "seed",
    "adapter",
    "adapters",
    "frozen_modules",
    "optimizer",
    "dpo",
    "classification",
)

_VERSIONED_PACKAGES = ("jax", "jaxlib", "flax", "optax")


def resolve_defaults(
    recipe: Recipe, saved_recipe_path: Path, resume: bool, devices: Sequence[Any]
) -> Recipe:
    """The recipe with what it leaves to the day and to the devices; a resumed run has both from
    when it began.

    Chat templates show the day. Layers lie apart on a single GPU, where a scan copies every layer's
    weights out of their stack, and what they keep for the gradient into one.

    Args:
        recipe: Which may leave them open.
        saved_recipe_path: The recipe that the run wrote when it began.
        resume: Whether it did.
        devices: What it runs on.
    """
    began: Any = {"data": {}, "model": {}}
    if resume and saved_recipe_path.is_file():
        began = yaml.safe_load(saved_recipe_path.read_text(encoding="utf-8"))
    data, model = recipe.data, recipe.model
    if data.chat_template_date is None:
        date = began["data"].get("chat_template_date") or datetime.date.today().isoformat()
        data = data.model_copy(update={"chat_template_date": date})
    if model.scan_layers is None:
        one_gpu = [device.platform for device in devices] == ["gpu"]
        scanned = began["model"].get("scan_layers") if resume else False if one_gpu else None
        model = model.model_copy(update={"scan_layers": scanned})
    return recipe.model_copy(update={"data": data, "model": model})


def collect_run_metadata(recipe: Recipe, setup: Setup, datasets: Datasets) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    dumped = recipe.model_dump(mode="json")
    # A checkpoint of before there were quantised bases says nothing of them.
    bound = (
        [*_RESUME_CHECKED_FIELDS, "quantize"]
        if recipe.quantize is not None
        else _RESUME_CHECKED_FIELDS
    )
    validation = None if datasets.validation is None else datasets.validation.fingerprint
    # Where the state lies changes no number, and earlier checkpoints do not say it.
    dumped["optimizer"].pop("offload")
    return {
        "recipe": {name: dumped[name] for name in bound},
        "numbers": {name: dumped["model"][name] for name in ("dtype", "compute_dtype")},
        "evaluation": {"metric": recipe.training.metric, "data": validation},
        "schedule": {name: dumped["training"][name] for name in ("epochs", "steps")},
        "data": datasets.train.fingerprint,
        "tokenizer": datasets.tokenizer.fingerprint,
        "base": setup.fingerprints,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
    }


def restore_run(
    checkpoints: CheckpointManager, setup: Setup, run_metadata: dict[str, Any], allow_changes: bool
) -> tuple[TrainState, TrainProgress]:
    """The state and progress of the last checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another run.
    """
    if not checkpoints.all_steps():
        raise FileNotFoundError(
            f"{checkpoints.folder} holds no checkpoint to go on from. Begin without --resume."
        )
    restored = checkpoints.restore(setup.state)
    changed = [
        name
        for name in run_metadata
        if run_metadata[name] != restored.metadata[name] and name != "versions"
    ]
    if changed and not allow_changes:
        told = [
            _describe_metadata_change(name, restored.metadata[name], run_metadata[name])
            for name in changed
        ]
        raise ValueError(
            f"The checkpoint of step {restored.step} in {checkpoints.folder} was made with another "
            f"{'; another '.join(told)}. Resume with what it was made with, or say "
            f"--allow-changes to go on all the same."
        )
    if run_metadata["versions"] != restored.metadata["versions"]:
        warnings.warn(
            f"The checkpoint was made with {restored.metadata['versions']}, and this is "
            f"{run_metadata['versions']}: the same to the last bit is not to be expected.",
            stacklevel=2,
        )
    progress = TrainProgress.from_dict(restored.metadata["progress"])
    if "evaluation" in changed:  # Scores of other kinds cannot be compared.
        progress.best_score, progress.best_step, progress.evals_since_best = -math.inf, None, 0
    return restored.state, progress


def _describe_metadata_change(name: str, old: Any, new: Any) -> str:
    """What changed of one fact, as far as it can be said in a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if name == "base":
            return f"base (the weight {keys[0]!r} has other numbers)"
        parts = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys]
        return f"{name} ({'; '.join(parts)})"
    return name

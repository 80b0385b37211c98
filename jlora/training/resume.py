"""Resuming a run: metadata that a checkpoint has of its run, and the comparison with the recipe."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora.checkpoints.text_files import name_file_in_errors, read_optional_text
from jlora.training.checkpointing import CheckpointManager
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.datasets import Datasets
from jlora.training.loop import TrainProgress
from jlora.training.recipe.load import parse_yaml
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, get_layer_layout_options
from jlora.training.train_step import TrainState

# Fields that must not change when a run is resumed; all others may.
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
    """Returns the recipe with the defaults that depend on the day and the devices filled in.

    Chat templates show the day. Layers are not scanned on a single GPU, where a scan copies the
    weights of every layer out of the stack, and the residuals of the gradient into one. A resumed
    run keeps both values from its start.

    Args:
        recipe: Recipe whose `chat_template_date` and `scan_layers` may be None.
        saved_recipe_path: Recipe that the run wrote at its start.
        resume: Whether the run is resumed.
        devices: Devices of the mesh.

    Raises:
        ValueError: The saved recipe is damaged.
    """
    saved: Any = {"data": {}, "model": {}}
    text = read_optional_text(saved_recipe_path) if resume else None
    if text is not None:
        saved = parse_yaml(text, str(saved_recipe_path))
    data, model = recipe.data, recipe.model
    with name_file_in_errors(saved_recipe_path):
        if data.chat_template_date is None:
            date = saved["data"].get("chat_template_date") or datetime.date.today().isoformat()
            datetime.date.fromisoformat(date)
            data = data.model_copy(update={"chat_template_date": date})
        if model.scan_layers is None:
            is_single_gpu = [device.platform for device in devices] == ["gpu"]
            default = False if is_single_gpu else None
            scan_layers = saved["model"].get("scan_layers") if resume else default
            if scan_layers not in (None, True, False):
                raise ValueError(f"model.scan_layers={scan_layers!r} must be true, false or null.")
            model = model.model_copy(update={"scan_layers": scan_layers})
    return recipe.model_copy(update={"data": data, "model": model})


def forget_unused_date(recipe: Recipe, given_date: str | None, tokenizer: Tokenizer) -> Recipe:
    """Returns the recipe without the date of a chat template that does not show it.

    The recipe is part of the adapter file, and the same run writes the same bytes on any day.

    Args:
        recipe: Recipe that `resolve_defaults` returned.
        given_date: The original recipe's `chat_template_date`, which is kept.
        tokenizer: Tokenizer of the run.
    """
    template = tokenizer.chat_template
    if given_date is not None or (template is not None and template.depends_on_date):
        return recipe
    data = recipe.data.model_copy(update={"chat_template_date": None})
    return recipe.model_copy(update={"data": data})


def collect_run_metadata(recipe: Recipe, setup: Setup, datasets: Datasets) -> dict[str, Any]:
    """Returns the metadata of a run that every checkpoint contains."""
    assert setup.base_digest is not None
    dumped = recipe.model_dump(mode="json")
    # Left out without quantization, so that such checkpoints are independent of this field.
    fields = [*_RESUME_CHECKED_FIELDS, *(["quantize"] if recipe.quantize is not None else [])]
    validation = None if datasets.validation is None else datasets.validation.fingerprint
    dumped["optimizer"].pop("offload")  # The memory of the state changes no value.
    return {
        "recipe": {name: dumped[name] for name in fields},
        "dtypes": {name: dumped["model"][name] for name in ("dtype", "compute_dtype")},
        "evaluation": {"metric": recipe.training.metric, "data": validation},
        "schedule": {name: dumped["training"][name] for name in ("epochs", "steps")},
        "data": datasets.train.fingerprint,
        "tokenizer": datasets.tokenizer.fingerprint,
        "config": setup.base_digest.config,
        "base": setup.base_digest.tensors,
        "layout": get_layer_layout_options(setup.model),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
    }


def restore_run(
    checkpoints: CheckpointManager, setup: Setup, run_metadata: dict[str, Any], allow_changes: bool
) -> tuple[TrainState, TrainProgress]:
    """Returns the training state and progress of the last checkpoint.

    Args:
        checkpoints: Checkpoints of the run.
        setup: Arrays of the run, with the shardings to restore to.
        run_metadata: Metadata of the resumed run.
        allow_changes: Whether the metadata may differ from that of the checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is damaged, belongs to another run, or has the other layout of
            layers, with `allow_changes` too.
    """
    if not checkpoints.all_steps():
        raise FileNotFoundError(
            f"{checkpoints.folder} has no checkpoint to resume from. Start without resume=True "
            f"(--resume)."
        )
    step = checkpoints.all_steps()[-1]
    saved = checkpoints.load_metadata(step)
    changed = [
        name
        for name in run_metadata
        if name not in ("versions", "layout") and run_metadata[name] != saved[name]
    ]
    if changed and not allow_changes:
        changes = [
            _describe_metadata_change(name, saved[name], run_metadata[name]) for name in changed
        ]
        raise ValueError(
            f"The checkpoint of step {step} in {checkpoints.folder} differs in "
            f"{'; '.join(changes)}. Restore these settings, or resume anyway with "
            f"allow_changes=True (--allow-changes)."
        )
    _check_layout(checkpoints, step, saved.get("layout", {}), run_metadata["layout"])
    restored = checkpoints.restore(setup.state, step)
    if run_metadata["versions"] != saved["versions"]:
        warnings.warn(
            f"The checkpoint was written with {saved['versions']}, and this is "
            f"{run_metadata['versions']}: results may differ in the last bits.",
            stacklevel=2,
        )
    progress = TrainProgress.from_dict(saved["progress"])
    if "evaluation" in changed:  # Scores on other data or of another metric are not comparable.
        progress.best_score, progress.best_step, progress.evals_since_best = -math.inf, None, 0
    return restored.state, progress


def _check_layout(
    checkpoints: CheckpointManager, step: int, saved: dict[str, Any], current: dict[str, Any]
) -> None:
    """Raises ValueError if a checkpoint's layers are stacked and the run's are not, or reversed."""
    before, now = saved.get("scan_layers"), current.get("scan_layers")
    if None not in (before, now) and before != now:
        raise ValueError(
            f"The checkpoint of step {step} in {checkpoints.folder} was written with "
            f"model.scan_layers={str(before).lower()}, and this run has {str(now).lower()}: the "
            f"arrays of its adapter and optimizer are others. Resume with "
            f"model.scan_layers={str(before).lower()}, as the run began; the adapter that it "
            f"writes fits both."
        )


def _describe_metadata_change(name: str, old: Any, new: Any) -> str:
    """Returns a short text about a changed entry of the metadata."""
    if name == "base":
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        return f"base (the weight {keys[0]!r} has other values)"
    parts = [
        f"{key}: {before} in the checkpoint, {now} now"
        for key, before, now in list_changes(old, new)
        if key
    ]
    return f"{name} ({'; '.join(parts)})" if parts else name


def list_changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted path of each field of nested mappings that differs, and its two values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else key
            yield from list_changes(old.get(key), new.get(key), inner)
    elif old != new:
        yield path, old, new

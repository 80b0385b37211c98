"""What the runs of one process share: data that was read, and steps that were compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jlora.training.datasets import Datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import MeshJitted, Setup

# No batch and no step depends on them.
_SECTIONS_OUTSIDE_PROGRAMS = {"output", "export", "report", "training", "distributed"}

_SECTIONS_OF_DATA = {"seed", "model", "data", "batch", "classification"}


class ProgramCache:
    """Data and compiled steps of earlier runs, for later ones that have the same.

    Give one to every `jlora.training.run.train` of a search: runs that differ in their seed are
    traced and compiled once, and runs that differ in their adapter read their data once. Files are
    taken to stay what they are.

    Attributes:
        data_fingerprints: Of the last run's data for training and validation.
    """

    def __init__(self, max_programs: int = 32) -> None:
        """Begins with nothing.

        Args:
            max_programs: How many programs are held; the one that was not used for longest goes first.
        """
        if max_programs < 1:
            raise ValueError(f"most={max_programs} holds no program. Give 1 or more.")
        self._max_programs = max_programs
        self._datasets: dict[str, Datasets] = {}
        self.data_fingerprints: dict[str, str | None] = {}
        self._programs: dict[str, tuple[MeshJitted, MeshJitted]] = {}

    def get_datasets(self, recipe: Recipe, mesh: Mesh, load: Callable[[], Datasets]) -> Datasets:
        """The recipe's data: that of an earlier run, or else what `load` returns."""
        key = _make_cache_key(recipe.model_dump(mode="json", include=_SECTIONS_OF_DATA), mesh)
        if key not in self._datasets:
            self._datasets[key] = load()
        found = self._datasets[key]
        validation = None if found.validation is None else found.validation.fingerprint
        self.data_fingerprints = {"train": found.train.fingerprint, "validation": validation}
        return found

    def reuse_programs(
        self, recipe: Recipe, setup: Setup, total_steps: int, num_labels: int | None
    ) -> Setup:
        """The setup with the step and evaluation of an earlier run, if there was one with the same.

        Args:
            recipe: Of the run.
            setup: Of the run.
            total_steps: How many it has, which learning rates depend on.
            num_labels: How many there are, for classification.
        """
        dumped = recipe.model_dump(
            mode="json", exclude={*_SECTIONS_OUTSIDE_PROGRAMS, "seed", "data"}
        )
        key = _make_cache_key(
            {**dumped, "task": recipe.task, "steps": total_steps, "labels": num_labels}, setup.mesh
        )
        step, evaluate = self._programs.pop(key, (setup.train_step, setup.eval_step))
        self._programs[key] = step, evaluate
        if len(self._programs) > self._max_programs:
            del self._programs[next(iter(self._programs))]
        return setup._replace(train_step=step, eval_step=evaluate)


def _make_cache_key(contents: dict[str, Any], mesh: Mesh) -> str:
    devices = [device.id for device in mesh.devices.flat]
    return json.dumps([contents, devices, mesh.shape_tuple], sort_keys=True)

"""What the runs of one process share: data that was read, and steps that were compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jlora.training.reading import Datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import OnMesh, Setup

# No batch and no step depends on them.
_ASIDE = {"output", "export", "report", "training", "distributed"}
_OF_DATA = {"seed", "model", "data", "batch", "classification"}


class Shared:
    """Data and compiled steps of earlier runs, for later ones that have the same.

    Give one to every `jlora.training.run.train` of a search: runs that differ in their seed are
    traced and compiled once, and runs that differ in their adapter read their data once. Files are
    taken to stay what they are.

    Attributes:
        fingerprints: Of the last run's data for training and validation.
    """

    def __init__(self, most: int = 32) -> None:
        """Begins with nothing.

        Args:
            most: How many programs are held; the one that was not used for longest goes first.
        """
        if most < 1:
            raise ValueError(f"most={most} holds no program. Give 1 or more.")
        self._most = most
        self._data: dict[str, Datasets] = {}
        self.fingerprints: dict[str, str | None] = {}
        self._programs: dict[str, tuple[OnMesh, OnMesh]] = {}

    def data(self, recipe: Recipe, mesh: Mesh, read: Callable[[], Datasets]) -> Datasets:
        """The recipe's data: that of an earlier run, or else what `read` returns."""
        key = _key(recipe.model_dump(mode="json", include=_OF_DATA), mesh)
        if key not in self._data:
            self._data[key] = read()
        found = self._data[key]
        validation = None if found.validation is None else found.validation.fingerprint
        self.fingerprints = {"train": found.train.fingerprint, "validation": validation}
        return found

    def programs(self, recipe: Recipe, setup: Setup, steps: int, labels: int | None) -> Setup:
        """The setup with the step and evaluation of an earlier run, if there was one with the same.

        Args:
            recipe: Of the run.
            setup: Of the run.
            steps: How many it has, which learning rates depend on.
            labels: How many there are, for classification.
        """
        dumped = recipe.model_dump(mode="json", exclude={*_ASIDE, "seed", "data"})
        key = _key({**dumped, "task": recipe.task, "steps": steps, "labels": labels}, setup.mesh)
        step, evaluate = self._programs.pop(key, (setup.step, setup.evaluate))
        self._programs[key] = step, evaluate
        if len(self._programs) > self._most:
            del self._programs[next(iter(self._programs))]
        return setup._replace(step=step, evaluate=evaluate)


def _key(facts: dict[str, Any], mesh: Mesh) -> str:
    devices = [device.id for device in mesh.devices.flat]
    return json.dumps([facts, devices, mesh.shape_tuple], sort_keys=True)

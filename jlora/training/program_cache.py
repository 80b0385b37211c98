"""Cache of datasets and compiled steps, shared by the runs of one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jlora.checkpoints.text_files import check_regular_file
from jlora.training.data.sources import hash_local_files
from jlora.training.datasets import Datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import MeshJitted, Setup

# Sections that affect neither batches nor steps.
_SECTIONS_OUTSIDE_PROGRAMS = {"output", "export", "report", "training", "distributed"}

_SECTIONS_OF_DATA = {"seed", "model", "data", "batch", "classification"}


class ProgramCache:
    """Datasets and compiled steps of earlier runs, for later runs with the same ones.

    Pass one cache to every `jlora.training.train` of a search: runs that differ in the seed are
    traced and compiled once, and runs that differ in the adapter tokenize their data once. Data is
    recognized by the bytes of its files and those of the tokenizer, and a program by the contents
    of config.json, so that changed files are read again.

    Attributes:
        data_fingerprints: Fingerprints of the last run's data by "train" and "validation"; None
            without validation data.
        base_summary: Digests of the last run's base, as `BaseDigest.summarize` returns them.

    Example:
        >>> from jlora.training import ProgramCache
        >>> cache = ProgramCache(max_programs=4)
        >>> cache.data_fingerprints
        {}
    """

    def __init__(self, max_programs: int = 32) -> None:
        """Creates an empty cache.

        Args:
            max_programs: Maximum number of compiled programs; the least recently used one is
                dropped first.

        Raises:
            ValueError: `max_programs` is not positive.
        """
        if max_programs < 1:
            raise ValueError(f"max_programs must be a positive integer, got {max_programs}.")
        self._max_programs = max_programs
        self._datasets: dict[str, tuple[str, Datasets]] = {}
        self.data_fingerprints: dict[str, str | None] = {}
        self.base_summary: dict[str, str] = {}
        self._programs: dict[str, tuple[MeshJitted, MeshJitted]] = {}

    def get_datasets(
        self, recipe: Recipe, folder: Path, mesh: Mesh, load: Callable[[], Datasets]
    ) -> Datasets:
        """Returns the datasets of a recipe: those of an earlier run, or the result of `load`.

        Args:
            recipe: Recipe of the run.
            folder: Folder of the base, which has the tokenizer.
            mesh: Mesh of the run.
            load: Function that reads the data.
        """
        key = _make_cache_key(recipe.model_dump(mode="json", include=_SECTIONS_OF_DATA), mesh)
        content = _hash_data_files(recipe, folder)
        if key not in self._datasets or self._datasets[key][0] != content:
            self._datasets[key] = (content, load())
        datasets = self._datasets[key][1]
        validation = None if datasets.validation is None else datasets.validation.fingerprint
        self.data_fingerprints = {"train": datasets.train.fingerprint, "validation": validation}
        return datasets

    def reuse_programs(
        self, recipe: Recipe, setup: Setup, total_steps: int, num_labels: int | None
    ) -> Setup:
        """Returns the setup with the compiled steps of an earlier equal run, if there was one.

        Args:
            recipe: Recipe of the run.
            setup: Setup of the run.
            total_steps: Number of steps, which the learning rate schedule depends on.
            num_labels: Number of labels; None unless the task is classification.
        """
        dumped = recipe.model_dump(
            mode="json", exclude={*_SECTIONS_OUTSIDE_PROGRAMS, "seed", "data"}
        )
        # The values of config.json are constants of a program.
        digest = setup.base_digest
        config = None if digest is None else digest.config
        self.base_summary = {} if digest is None else digest.summarize()
        fields = {"task": recipe.task, "steps": total_steps, "labels": num_labels}
        key = _make_cache_key({**dumped, **fields, "config": config}, setup.mesh)
        programs = self._programs.pop(key, (setup.train_step, setup.eval_step))
        self._programs[key] = programs
        if len(self._programs) > self._max_programs:
            del self._programs[next(iter(self._programs))]
        return setup._replace(train_step=programs[0], eval_step=programs[1])


def _hash_data_files(recipe: Recipe, folder: Path) -> str:
    """Returns a hash of the data files, and of the files that decide how they are tokenized."""
    data = recipe.data
    sources = [*data.train, *data.validation, *data.test]
    contents = [hash_local_files(source.path, source.split) for source in sources]
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jinja")])
    if data.chat_template is not None:
        files.append(Path(data.chat_template))
    for file in files:
        check_regular_file(file)
    hashes = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return repr((contents, hashes))


def _make_cache_key(contents: dict[str, Any], mesh: Mesh) -> str:
    devices = [device.id for device in mesh.devices.flat]
    return json.dumps([contents, devices, mesh.shape_tuple], sort_keys=True)

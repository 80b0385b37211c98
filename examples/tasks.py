"""What the examples about several adapters share: the quickstart's task, split by package.

A task is to tell some of the twelve packages apart by their docstrings. Everything about texts,
batches and heads is the quickstart's; here is the training of one adapter on one such task, alone
or on top of an earlier one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
import jlora.models
from examples import quickstart
from jlora.merging import compose_adapters

Adapter = dict[str, Any]
Head = quickstart.Head

KERNELS = r"layer_\d+/.*/kernel"
SETTINGS = quickstart.Settings(lengths=(16, 32))
TINY = dataclasses.replace(quickstart.TINY, batch_size=4)


class Encoder(NamedTuple):
    """The encoder, its LoRA, and the texts of all packages.

    Attributes:
        model: The encoder's module.
        kernels: A pattern for those that are adapted.
        lora: Around it.
        params: Its base.
        texts: The splits `train` and `test`, tokenised.
        settings: The size of a run.
        step: One step of training, compiled for each length of texts.
        encode: The mean hidden states of the encoder with any parameters.
        moments: Those of what its kernels meet, likewise.
    """

    model: Any
    kernels: str
    lora: jlora.LoraTransform
    params: Any
    texts: datasets.DatasetDict
    settings: quickstart.Settings
    step: Callable[..., Any]
    encode: Callable[..., jax.Array]
    moments: Callable[..., dict[str, Any]]

    def fresh(self, seed: int) -> Adapter:
        """An adapter that changes nothing yet, its input directions drawn at random."""
        return self.lora.init(jax.random.key(seed), self.params, *self._shapes())

    def fresh_along(self, moments: dict[str, Any]) -> Adapter:
        """One whose input directions are those in which inputs of these moments are largest."""
        init = jlora.initializers.eva(moments, center=False)
        settings = self.settings
        rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha, init=init)
        lora = jlora.lora_transform(self.model.apply, {self.kernels: rule})
        return lora.init(jax.random.key(0), self.params, *self._shapes())

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        ids = jax.ShapeDtypeStruct((1, self.settings.lengths[0]), jnp.int32)
        return ids, ids

    def features(self, adapter: Adapter, data: Sequence[quickstart.Batch]) -> jax.Array:
        """The mean hidden states (texts, width) under an adapter.

        It is merged, so that adapters of all kinds share one program.
        """
        merged = self.lora.merge(self.params, adapter)
        return quickstart.features_of(functools.partial(self.encode, merged), data)


def loaded(settings: quickstart.Settings, kernels: str = KERNELS) -> Encoder:
    """Everything that the examples start with, LoRA on the kernels of this pattern."""
    checkpoint = quickstart.find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha)
    lora = jlora.lora_transform(model.apply, {kernels: rule})
    texts = quickstart.load_texts(settings.texts_per_package)
    texts = quickstart.tokenised(texts, checkpoint, settings.lengths[-1])
    encode = quickstart.pooled(model.apply)
    moments = jax.jit(functools.partial(jlora.input_moments, model.apply, {kernels: rule}))
    return Encoder(
        model, kernels, lora, params, texts, settings, step_of(lora, settings), encode, moments
    )


# --- tasks ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Telling some packages apart.

    Attributes:
        packages: Their names.
        allowed: (packages of the quickstart,), whether it is one of them.
        train: The texts to train on.
        test: Batches to test on.
    """

    packages: tuple[str, ...]
    allowed: np.ndarray
    train: datasets.Dataset
    test: list[quickstart.Batch]


def task_of(encoder: Encoder, packages: Sequence[str]) -> Task:
    """The task to tell these packages apart."""
    allowed = np.isin(quickstart.PACKAGES, packages)
    splits = {}
    for name, split in encoder.texts.items():
        chosen = np.flatnonzero(allowed[np.array(split["label"])])
        splits[name] = split.select(chosen)
    test = quickstart.batches(splits["test"], encoder.settings)
    return Task(tuple(packages), allowed, splits["train"], test)


def head_for(encoder: Encoder, task: Task, adapter: Adapter) -> Head:
    """The best linear head of a task on features under an adapter."""
    data = quickstart.batches(task.train, encoder.settings)
    return quickstart.fitted_head(encoder.features(adapter, data), quickstart.labels_of(data))


def scores_of(head: Head, features: jax.Array, allowed: Any) -> jax.Array:
    """The scores (texts, packages), minus infinity for packages that are not of the task."""
    return jnp.where(allowed, quickstart.scores_of(head, features), -jnp.inf)


def errors_of(scores: jax.Array, labels: Any, allowed: Any, smoothing: float) -> jax.Array:
    """The cross entropy (texts,) with targets smoothed over the packages of the task."""
    targets = jax.nn.one_hot(labels, len(quickstart.PACKAGES))
    targets = (1 - smoothing) * targets + smoothing * allowed / allowed.sum()
    # Where a score is minus infinity the target is zero, and so is what it adds.
    logarithms = jnp.where(allowed, jax.nn.log_softmax(scores), 0)
    return -(targets * logarithms).sum(1)


class Judged(NamedTuple):
    """How good an adapter is at a task's test texts."""

    loss: float  # nats
    accuracy: float  # the share of texts that score highest at their own package


def judged(encoder: Encoder, task: Task, head: Head, adapter: Adapter) -> Judged:
    """How good an adapter is at a task."""
    scores = scores_of(head, encoder.features(adapter, task.test), task.allowed)
    labels = quickstart.labels_of(task.test)
    loss = errors_of(scores, labels, task.allowed, 0.0).mean()
    return Judged(float(loss), float(np.mean(np.argmax(scores, axis=1) == labels)))


# --- training ------------------------------------------------------------------------------------


def step_of(lora: jlora.LoraTransform, settings: quickstart.Settings) -> Callable[..., Any]:
    """One step: from the state, what is frozen, a batch and a learning rate to state and loss.

    What is trained is `{"adapter", "head"}`, or the adapter alone under a frozen head.
    """
    optimizer = optimizer_of()

    def loss(trained: Any, frozen: Any, batch: quickstart.Batch) -> jax.Array:
        adapter, earlier = trained["adapter"], frozen["earlier"]
        active = adapter if earlier is None else compose_adapters(earlier, adapter)
        hidden = lora.apply(frozen["params"], active, batch.ids, batch.mask)
        head = trained["head"] if "head" in trained else frozen["head"]
        scores = scores_of(head, jlora.models.mean_pool(hidden, batch.mask), frozen["allowed"])
        errors = errors_of(scores, batch.labels, frozen["allowed"], settings.label_smoothing)
        mean = jnp.average(errors, weights=batch.real)
        if earlier is None:
            return mean
        return mean + frozen["strength"] * jlora.subspace_overlap(adapter, earlier)

    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: quickstart.TrainState, frozen: Any, batch: quickstart.Batch, rate: jax.Array
    ) -> tuple[quickstart.TrainState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.trained, frozen, batch)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        trained = optax.apply_updates(state.trained, updates)
        return quickstart.TrainState(trained, optimizer_state), value

    return step


def optimizer_of() -> optax.GradientTransformation:
    """Adam, before its learning rate, which every step is given."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    return jlora.lora_optimizer(clipped)


def trained(
    encoder: Encoder,
    task: Task,
    head: Head,
    start: Adapter,
    *,
    seed: int,
    with_head: bool = False,
    earlier: Adapter | None = None,
    strength: float = 0.0,
) -> tuple[Adapter, Head]:
    """An adapter for a task, and its head.

    Args:
        encoder: What it adapts.
        task: What it learns.
        head: Its head: frozen, or where training starts.
        start: The adapter before the first step.
        seed: Of the order of the texts.
        with_head: Whether the head is trained too.
        earlier: An adapter below it, active and frozen.
        strength: The factor of the overlap with it in the loss.
    """
    settings = encoder.settings
    rng = np.random.default_rng(seed)
    plan = [
        batch
        for _ in range(settings.epochs)
        for batch in quickstart.batches(task.train, settings, rng)
    ]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup_steps=len(plan) // 10, decay_steps=len(plan)
    )
    weights: dict[str, Any] = {"adapter": start, "head": head} if with_head else {"adapter": start}
    weights = jax.tree.map(jnp.copy, weights)  # The step takes their memory.
    frozen = {
        "params": encoder.params,
        "head": head,
        "earlier": earlier,
        "allowed": task.allowed,
        "strength": strength,
    }
    state = quickstart.TrainState(weights, optimizer_of().init(weights))
    for number, batch in enumerate(plan):
        state, _ = encoder.step(state, frozen, batch, rate(number))
    return state.trained["adapter"], state.trained.get("head", head)


# --- the report ----------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, float]], width: int = 30) -> str:
    """Rows of figures under the names of their columns."""
    widths = {column: max(8, len(column)) + 2 for column in next(iter(rows.values()))}
    lines = [" " * width + "".join(f"{column:>{widths[column]}}" for column in widths)]
    for name, figures in rows.items():
        cells = (f"{figures[column]:{widths[column]}.3f}" for column in widths)
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def circumstances(name: str, settings: quickstart.Settings) -> dict[str, Any]:
    """What made the figures."""
    return {
        "settings": dataclasses.asdict(settings),
        "command": f"python examples/{name}.py",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": quickstart.versions(),
    }


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` into a new folder.

    Raises:
        FileExistsError: The folder exists.
    """
    output.mkdir(parents=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def arguments(description: str, name: str) -> tuple[Path, bool]:
    """The folder that the command line names, or a free one, and whether the run is tiny.

    Raises:
        FileExistsError: The folder exists.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"must not exist yet; by default {name}-output, or that with the next free number",
    )
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, to see it work")
    given = parser.parse_args()
    output = given.output or quickstart.free_folder(f"{name}-output")
    if output.exists():
        raise FileExistsError(
            f"--output={output} exists and is left as it was. Name a new folder, or move this away."
        )
    datasets.disable_progress_bars()
    return output, given.tiny

"""Shared code of the examples with several adapters: the quickstart's task, split by package.

A task is the classification of docstrings among some of the twelve packages. Texts, batches and
heads come from the quickstart; this module trains one adapter on one such task, alone or on top of
an earlier adapter.
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
    """Encoder, its LoRA transform, and the texts of all packages.

    Attributes:
        model: Module of the encoder.
        kernels: Pattern of the adapted kernels.
        lora: LoRA transform of the encoder.
        params: Parameters of the encoder.
        texts: Tokenized splits `train` and `test`.
        settings: Settings of a run.
        step: Training step, compiled for each length of texts.
        encode: Mean hidden states of the encoder, as a function of its parameters.
        moments: Input moments of the kernels, likewise.
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

    def init_adapter(self, seed: int) -> Adapter:
        """Returns an initial adapter with random input directions."""
        return self.lora.init(jax.random.key(seed), self.params, *self._shapes())

    def init_adapter_along(self, moments: dict[str, Any]) -> Adapter:
        """Returns an initial adapter along the largest directions of these input moments (EVA)."""
        init = jlora.initializers.eva(moments, center=False)
        settings = self.settings
        rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha, init=init)
        lora = jlora.lora_transform(self.model.apply, {self.kernels: rule})
        return lora.init(jax.random.key(0), self.params, *self._shapes())

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        ids = jax.ShapeDtypeStruct((1, self.settings.lengths[0]), jnp.int32)
        return ids, ids

    def features(self, adapter: Adapter, data: Sequence[quickstart.Batch]) -> jax.Array:
        """Returns the mean hidden states (texts, width) with an adapter.

        The adapter is merged, so that all kinds of adapters share one program.
        """
        merged = self.lora.merge(self.params, adapter)
        return quickstart.compute_features(functools.partial(self.encode, merged), data)


def load_encoder(settings: quickstart.Settings, kernels: str = KERNELS) -> Encoder:
    """Loads the encoder and the texts, with LoRA on the kernels of a pattern."""
    checkpoint = quickstart.find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha)
    lora = jlora.lora_transform(model.apply, {kernels: rule})
    texts = quickstart.load_texts(settings.texts_per_package)
    texts = quickstart.tokenize(texts, checkpoint, settings.lengths[-1])
    encode = quickstart.compile_mean_pool(model.apply)
    moments = jax.jit(functools.partial(jlora.input_moments, model.apply, {kernels: rule}))
    return Encoder(
        model, kernels, lora, params, texts, settings, make_step(lora, settings), encode, moments
    )


# --- tasks ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Classification among some packages.

    Attributes:
        packages: Names of the packages.
        allowed: True for these packages, (packages of the quickstart,).
        train: Training texts.
        test: Test batches.
    """

    packages: tuple[str, ...]
    allowed: np.ndarray
    train: datasets.Dataset
    test: list[quickstart.Batch]


def make_task(encoder: Encoder, packages: Sequence[str]) -> Task:
    """Returns the task of these packages."""
    allowed = np.isin(quickstart.PACKAGES, packages)
    splits = {}
    for name, split in encoder.texts.items():
        chosen = np.flatnonzero(allowed[np.array(split["label"])])
        splits[name] = split.select(chosen)
    test = quickstart.batches(splits["test"], encoder.settings)
    return Task(tuple(packages), allowed, splits["train"], test)


def fit_task_head(encoder: Encoder, task: Task, adapter: Adapter) -> Head:
    """Returns a linear head fitted to a task's features with an adapter."""
    data = quickstart.batches(task.train, encoder.settings)
    return quickstart.fit_head(encoder.features(adapter, data), quickstart.collect_labels(data))


def compute_task_scores(head: Head, features: jax.Array, allowed: Any) -> jax.Array:
    """Returns the scores (texts, packages), minus infinity for packages outside the task."""
    return jnp.where(allowed, quickstart.compute_scores(head, features), -jnp.inf)


def cross_entropy(scores: jax.Array, labels: Any, allowed: Any, smoothing: float) -> jax.Array:
    """Returns the cross entropy (texts,), with targets smoothed over the task's packages."""
    targets = jax.nn.one_hot(labels, len(quickstart.PACKAGES))
    targets = (1 - smoothing) * targets + smoothing * allowed / allowed.sum()
    # A score of minus infinity has a target of zero, and contributes zero.
    log_probs = jnp.where(allowed, jax.nn.log_softmax(scores), 0)
    return -(targets * log_probs).sum(1)


class Evaluation(NamedTuple):
    """Test result of an adapter on a task.

    Attributes:
        loss: Cross entropy, in nats.
        accuracy: Fraction of texts with the highest score for their package.
    """

    loss: float
    accuracy: float


def evaluate(encoder: Encoder, task: Task, head: Head, adapter: Adapter) -> Evaluation:
    """Evaluates an adapter on a task's test texts."""
    scores = compute_task_scores(head, encoder.features(adapter, task.test), task.allowed)
    labels = quickstart.collect_labels(task.test)
    loss = cross_entropy(scores, labels, task.allowed, 0.0).mean()
    return Evaluation(float(loss), float(np.mean(np.argmax(scores, axis=1) == labels)))


# --- training ------------------------------------------------------------------------------------


def make_step(lora: jlora.LoraTransform, settings: quickstart.Settings) -> Callable[..., Any]:
    """Returns the step: (state, frozen arrays, batch, learning rate) to state and loss.

    The trainable tree is `{"adapter", "head"}`, or `{"adapter"}` with a frozen head.
    """
    optimizer = make_optimizer()

    def loss(trained: Any, frozen: Any, batch: quickstart.Batch) -> jax.Array:
        adapter, earlier = trained["adapter"], frozen["earlier"]
        active = adapter if earlier is None else compose_adapters(earlier, adapter)
        hidden = lora.apply(frozen["params"], active, batch.ids, batch.mask)
        head = trained["head"] if "head" in trained else frozen["head"]
        scores = compute_task_scores(
            head, jlora.models.mean_pool(hidden, batch.mask), frozen["allowed"]
        )
        errors = cross_entropy(scores, batch.labels, frozen["allowed"], settings.label_smoothing)
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


def make_optimizer() -> optax.GradientTransformation:
    """Returns Adam without a learning rate, which each step applies."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    return jlora.lora_optimizer(clipped)


def train_adapter(
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
    """Trains an adapter on a task; returns it and its head.

    Args:
        encoder: Encoder to adapt.
        task: Task to train on.
        head: Head of the task, frozen or initial.
        start: Initial adapter.
        seed: Random seed of the order of the texts.
        with_head: True to train the head too.
        earlier: Frozen adapter that stays active; None: none.
        strength: Weight of the overlap with the earlier adapter in the loss.
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
    weights = jax.tree.map(jnp.copy, weights)  # The step donates them.
    frozen = {
        "params": encoder.params,
        "head": head,
        "earlier": earlier,
        "allowed": task.allowed,
        "strength": strength,
    }
    state = quickstart.TrainState(weights, make_optimizer().init(weights))
    for number, batch in enumerate(plan):
        state, _ = encoder.step(state, frozen, batch, rate(number))
    return state.trained["adapter"], state.trained.get("head", head)


# --- the report ----------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, float]], width: int = 30) -> str:
    """Returns a table of rows of figures."""
    widths = {column: max(8, len(column)) + 2 for column in next(iter(rows.values()))}
    lines = [" " * width + "".join(f"{column:>{widths[column]}}" for column in widths)]
    for name, figures in rows.items():
        cells = (f"{figures[column]:{widths[column]}.3f}" for column in widths)
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def describe_run(name: str, settings: quickstart.Settings) -> dict[str, Any]:
    """Returns the settings, command, device and versions of a run."""
    return {
        "settings": dataclasses.asdict(settings),
        "command": f"python examples/{name}.py",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": quickstart.versions(),
    }


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` into a new folder.

    Raises:
        FileExistsError: If the folder exists.
    """
    output.mkdir(parents=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments(description: str, name: str) -> tuple[Path, bool]:
    """Returns the output folder of the command line, and whether the run is tiny.

    Raises:
        FileExistsError: If the folder exists.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"new folder; by default {name}-output, or with the next free number",
    )
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, as a check")
    options = parser.parse_args()
    output = options.output or quickstart.unused_folder(f"{name}-output")
    if output.exists():
        raise FileExistsError(
            f"--output={output} already exists and is not overwritten. Use a new folder, or move "
            f"this one."
        )
    datasets.disable_progress_bars()
    return output, options.tiny

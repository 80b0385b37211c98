"""Test accuracy and trainable parameters of each adapter family on the quickstart's task.

Prints a table and writes JSON after every family. Everything is as in `examples/quickstart.py`,
except the adapter, its optimizer and its learning rate. Of two rates, the one with the lower loss
on a tenth of the training texts is used, after as many epochs on the beginnings of the others.
As a check on a CPU in a few minutes:
`python -m benchmarks.quality.methods --tiny`; the committed figures:
`python -m benchmarks.quality.methods --output benchmarks/results/family_accuracy.json`.

Each family has one run with one seed, on a few hundred test texts: accuracies within two of the
standard errors in the JSON do not differ significantly.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
import jlora.models
from jlora.adapters import AdapterConfig

Adapter = Mapping[str, Any]
Batch = Any  # That of the quickstart.

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = r"layer_\d+/.*/kernel"
HEAD_RATE = 2e-3  # The same for every family.
BALANCE = 0.01  # The factor of the mixture's load-balancing loss, zero for all others.


def load_script(path: pathlib.Path) -> Any:
    """Returns a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


quickstart = load_script(ROOT / "examples/quickstart.py")

FULL = quickstart.Settings()
TINY = dataclasses.replace(quickstart.TINY, texts_per_package=6)


def search_settings(settings: Any) -> Any:
    """Returns the settings for learning rates, with texts truncated to the shortest length."""
    return dataclasses.replace(settings, lengths=settings.lengths[:1])


# --- the families --------------------------------------------------------------------------------


def adam(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Returns Adam for the trainable parameters of a family."""
    del steps
    return jlora.lora_optimizer(optax.adam(rate))


def adam_with(ratios: Mapping[str, float]) -> Callable[..., optax.GradientTransformation]:
    """Returns Adam with multipliers of the learning rate for some labels."""
    return lambda rate, steps: jlora.lora_optimizer(optax.adam(rate), lr_multipliers=ratios)


def adam_with_budget(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Returns Adam with AdaLoRA's budget, two thirds of the ranks at the end."""
    return jlora.adalora_rank_allocator(
        adam(rate, steps),
        target_rank=8,
        total_steps=steps,
        warmup_steps=steps // 10,
        final_steps=steps // 4,
    )


def adam_with_threshold(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Returns Adam and SoRA's proximal step, for a penalty of 0.3 on the absolute gates.

    Adam's steps are about the learning rate for any gradient, so a penalty of one would close every
    gate; and gates start at one, which requires ten times the rate to change in time.
    """
    del steps
    optimizer = jlora.lora_optimizer(optax.adam(rate), lr_multipliers={"gate": 10})
    return optax.chain(optimizer, jlora.soft_threshold(lambda _: 10 * rate * 0.3))


def no_penalty(adapter: Adapter) -> jax.Array:
    """Returns zero: no penalty."""
    del adapter
    return jnp.zeros(())


def same_base(params: Any, adapter: Adapter) -> Any:
    """Returns the encoder unchanged."""
    del adapter
    return params


def no_figures(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """Returns no further figures."""
    del adapter, accuracy_of
    return {}


def at_lower_ranks(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """Returns DyLoRA's test accuracy with only its first ranks."""
    return {
        f"test_accuracy_rank_{rank}": accuracy_of(jlora.truncate_rank(adapter, rank))
        for rank in (1, 2, 4)
    }


def pruned(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """Returns the fraction of ranks that AdaLoRA or SoRA set to zero, and the accuracy without."""
    # SoRA's gates, or AdaLoRA's singular values.
    gates = [leaf.gate if hasattr(leaf, "gate") else leaf.s for leaf in adapter.values()]
    closed = jnp.concatenate([gate.ravel() for gate in gates]) == 0
    return {
        "share_of_ranks_at_zero": float(closed.mean()),
        "test_accuracy_pruned": accuracy_of(jlora.prune_ranks(adapter)),
    }


class Family(NamedTuple):
    """One row of the table.

    Attributes:
        name: Name in the table.
        config: Adapter config of every weight that the pattern matches.
        rates: Learning rates to compare.
        pattern: Pattern of the adapted weights.
        optimizer: Function `(current learning rate, steps)` to the adapter's optimizer.
        penalty: Function of the adapter, added to the loss.
        base: Function `(params, initial adapter)` to the parameters of the adapter's base.
        mergeable: True if the adapter can be merged.
        figures: Function `(adapter, accuracy of a merged adapter)` to further figures.
    """

    name: str
    config: AdapterConfig
    rates: tuple[float, ...]
    pattern: str = KERNELS
    optimizer: Callable[[jax.Array, int], optax.GradientTransformation] = adam
    penalty: Callable[[Adapter], jax.Array] = no_penalty
    base: Callable[[Any, Adapter], Any] = same_base
    mergeable: bool = True
    figures: Callable[[Adapter, Callable[[Adapter], float]], dict[str, float]] = no_figures


FAMILIES = (
    Family("LoRA", jlora.LoRA(rank=8, alpha=16.0), (2e-3, 4e-3)),
    Family("rsLoRA", jlora.LoRA(rank=8, alpha=16.0, use_rslora=True), (1e-3, 2e-3)),
    Family("LoRA+", jlora.LoRA(rank=8, alpha=16.0), (2e-4, 5e-4), optimizer=adam_with({"b": 16})),
    Family(
        "PiSSA",
        jlora.LoRA(rank=8, alpha=8.0, init=jlora.initializers.pissa()),
        (5e-4, 1e-3),
        base=jlora.residual_base,
    ),
    Family("LoRA-FA", jlora.LoRAFA(rank=8, alpha=16.0), (4e-3, 8e-3)),
    Family("DoRA", jlora.DoRA(rank=8, alpha=16.0), (2e-3, 4e-3)),
    Family("VeRA", jlora.VeRA(rank=256), (2e-2, 5e-2)),
    Family(
        "AdaLoRA",
        jlora.AdaLoRA(rank=12, alpha=24.0),
        (1e-2, 3e-2),
        optimizer=adam_with_budget,
        penalty=lambda adapter: 0.1 * jlora.orthogonal_regularizer(adapter),
        figures=pruned,
    ),
    Family("DyLoRA", jlora.DyLoRA(rank=8, alpha=16.0), (2e-3, 4e-3), figures=at_lower_ranks),
    Family(
        "SoRA",
        jlora.SoRA(rank=8, alpha=16.0),
        (2e-3, 4e-3),
        optimizer=adam_with_threshold,
        figures=pruned,
    ),
    Family("LoHa", jlora.LoHa(rank=4, alpha=8.0), (1e-2, 2e-2)),
    Family("LoKr", jlora.LoKr(rank=8, alpha=16.0), (1e-2, 2e-2)),
    Family("HiRA", jlora.HiRA(rank=8), (1e-2, 3e-2)),
    # On weights this small, an initial adapter of the default deviation reduces the accuracy.
    Family("FourierFT", jlora.FourierFT(num_frequencies=200, std=0.0), (3e-2, 1e-1)),
    Family("IA3", jlora.IA3(), (2e-2, 5e-2)),
    Family(
        "VB-LoRA",
        jlora.VBLoRA(rank=4, num_vectors=64, vector_length=128),
        (5e-3, 2e-2),
        optimizer=adam_with({"logits": 10}),
    ),
    Family("BitFit", jlora.BitFit(), (2e-3, 5e-3), pattern=r"layer_\d+/.*bias"),
    Family("Full", jlora.FullDelta(), (1e-4, 2e-4), pattern=r"layer_\d+/"),
    Family(
        "Mixture of LoRAs",
        jlora.LoRAMoE(num_experts=4, rank=2, alpha=4.0),
        (2e-3, 4e-3),
        mergeable=False,
    ),
)


# --- the texts -----------------------------------------------------------------------------------


def is_validation(text: str) -> bool:
    """Returns True for one training text in ten, by its hash, for validation."""
    return hashlib.sha256(text.encode()).digest()[1] < 256 // 10


class Split(NamedTuple):
    """Training and evaluation batches, and the initial head.

    Attributes:
        plan: Batches of the training steps, in order.
        eval_batches: Batches to evaluate on.
        labels: Labels of the evaluation batches, (texts,).
        head: Initial head.
    """

    plan: list[Batch]
    eval_batches: list[Batch]
    labels: np.ndarray
    head: Any


def prepare_split(
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    settings: Any,
    encode: Callable[..., jax.Array],
) -> Split:
    """Returns the batches of two datasets, and a head fitted on `encode(ids, mask)`."""
    rng = np.random.default_rng(0)
    plan = [b for _ in range(settings.epochs) for b in quickstart.batches(train, settings, rng)]
    in_order = quickstart.batches(train, settings)
    features = quickstart.compute_features(encode, in_order)
    head = quickstart.fit_head(features, quickstart.collect_labels(in_order))
    eval_batches = quickstart.batches(evaluation, settings)
    return Split(plan, eval_batches, quickstart.collect_labels(eval_batches), head)


# --- training ------------------------------------------------------------------------------------


class State(NamedTuple):
    """Training state."""

    trained: Any  # {"adapter": ..., "head": ...}
    adapter_optimizer: optax.OptState
    head_optimizer: optax.OptState


class TrainingRun(NamedTuple):
    """Measurements of a training run."""

    losses: list[float]  # nats, of each step, without penalties
    seconds: float  # of all steps, each taken at the median of its length
    compile_seconds: float


class Trainer:
    """Training of one family on the encoder, with its compiled steps."""

    def __init__(self, family: Family, model: Any, params: Any, example: Batch) -> None:
        self.family = family
        self.lora = jlora.lora_transform(model.apply, {family.pattern: family.config})
        self.fresh = self.lora.init(jax.random.key(0), params, example.ids, example.mask)
        self.params = family.base(params, self.fresh)
        self.encode = quickstart.compile_mean_pool(self.lora.apply)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def train(self, plan: list[Batch], head: Any, rate: float) -> tuple[Any, TrainingRun]:
        """Trains one step per batch; returns `{"adapter", "head"}` and the measurements."""
        steps = len(plan)
        state = State(
            {"adapter": self.fresh, "head": head},
            self.family.optimizer(jnp.float32(rate), steps).init(self.fresh),
            optax.adam(HEAD_RATE).init(head),
        )
        start = time.perf_counter()
        programs = [self._program(steps, state, batch) for batch in plan]
        compiled = time.perf_counter()
        losses = []
        seconds: dict[int, list[float]] = collections.defaultdict(list)
        for number, (program, batch) in enumerate(zip(programs, plan, strict=True)):
            before = time.perf_counter()
            state, loss = program(state, self.params, batch, jnp.int32(number), jnp.float32(rate))
            losses.append(float(loss))
            seconds[batch.ids.shape[1]].append(time.perf_counter() - before)
        total = sum(len(some) * statistics.median(some) for some in seconds.values())
        return state.trained, TrainingRun(losses, total, compiled - start)

    def _program(self, steps: int, state: State, batch: Batch) -> Callable[..., Any]:
        """Returns the step compiled for the batch's length and the number of steps."""
        key = steps, batch.ids.shape
        if key not in self._compiled:
            step = jax.jit(functools.partial(self._step, steps))
            lowered = step.lower(state, self.params, batch, jnp.int32(0), jnp.float32(0))
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def _step(
        self,
        steps: int,
        state: State,
        params: Any,
        batch: Batch,
        number: jax.Array,
        rate: jax.Array,
    ) -> tuple[State, jax.Array]:
        scale = jnp.asarray(
            optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)(number)
        )
        key = jax.random.fold_in(jax.random.key(1), number)

        def loss(trained: Any) -> tuple[jax.Array, jax.Array]:
            hidden, balance = self.lora.apply_with_aux_loss(
                params, trained["adapter"], batch.ids, batch.mask, dropout_key=key
            )
            features = jlora.models.mean_pool(hidden, batch.mask)
            scores = quickstart.compute_scores(trained["head"], features)
            targets = jax.nn.one_hot(batch.labels, len(quickstart.PACKAGES))
            targets = optax.smooth_labels(targets, quickstart.Settings.label_smoothing)
            errors = optax.softmax_cross_entropy(scores, targets)
            error = jnp.average(errors, weights=batch.real)
            return error + BALANCE * balance + self.family.penalty(trained["adapter"]), error

        (_, error), gradient = jax.value_and_grad(loss, has_aux=True)(state.trained)
        clip = optax.clip_by_global_norm(1.0)
        clipped: Any = clip.update(gradient, clip.init(gradient))[0]
        adapter_updates, adapter_optimizer = self.family.optimizer(rate * scale, steps).update(
            clipped["adapter"], state.adapter_optimizer, state.trained["adapter"]
        )
        head_updates, head_optimizer = optax.adam(HEAD_RATE * scale).update(
            clipped["head"], state.head_optimizer
        )
        updates = {"adapter": adapter_updates, "head": head_updates}
        trained = optax.apply_updates(state.trained, updates)
        return State(trained, adapter_optimizer, head_optimizer), error

    def features(self, adapter: Adapter, batches: list[Batch]) -> jax.Array:
        """Returns the mean hidden states (texts, width) of the adapted encoder."""
        return quickstart.compute_features(
            functools.partial(self.encode, self.params, adapter), batches
        )


class Trial(NamedTuple):
    """Validation result of one learning rate; the loss is None if not finite."""

    learning_rate: float
    validation_loss: float | None  # nats
    validation_accuracy: float


def run_trial(trainer: Trainer, split: Split, rate: float) -> Trial:
    """Trains and evaluates one learning rate."""
    trained, _ = trainer.train(split.plan, split.head, rate)
    features = trainer.features(trained["adapter"], split.eval_batches)
    scores = quickstart.compute_scores(trained["head"], features)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, split.labels).mean()
    accuracy = quickstart.accuracy(trained["head"], features, split.labels)
    return Trial(rate, float(loss) if jnp.isfinite(loss) else None, accuracy)


def best_rate(trials: list[Trial]) -> float:
    """Returns the learning rate of the lowest loss.

    Raises:
        FloatingPointError: If no loss is finite.
    """
    finite = [(t.validation_loss, t.learning_rate) for t in trials if t.validation_loss is not None]
    if not finite:
        raise FloatingPointError(f"No learning rate has a finite loss: {trials}.")
    return min(finite)[1]


# --- the report ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one family.

    Attributes:
        family: Name of the family.
        test_accuracy: Accuracy on the test texts.
        adapter_parameters: Number of trainable parameters of the adapter.
        trained_parameters: Number of trainable parameters with the head.
        seconds: Time of the training steps, each at the median of its length, without compilation
            and search.
        compile_seconds: Time of compilation.
        last_loss: Mean training loss in nats, with smoothed labels, of the last 20 steps.
        merged_minus_adapted_max_abs: Largest difference of the mean hidden states of the test
            texts; None if the adapter cannot be merged.
        learning_rate: Peak learning rate of the adapter; its schedule is that of the quickstart.
        pattern: Pattern of the adapted weights.
        config: Adapter config.
        trials: Trials of the learning rates.
        figures: Further figures of this family.
    """

    family: str
    test_accuracy: float
    adapter_parameters: int
    trained_parameters: int
    seconds: float
    compile_seconds: float = 0.0
    last_loss: float | None = None
    merged_minus_adapted_max_abs: float | None = None
    learning_rate: float | None = None
    pattern: str | None = None
    config: str | None = None
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


def measure(
    family: Family,
    model: Any,
    params: Any,
    encode: Callable[..., jax.Array],
    search: Split,
    full: Split,
) -> Row:
    """Selects the learning rate of a family, trains on all training texts, and tests.

    Args:
        family: Family to train.
        model: Encoder.
        params: Parameters of the encoder.
        encode: Compiled `(params, ids, mask)` to mean hidden states, without an adapter.
        search: Split of the training texts, for the learning rate.
        full: Split of all training texts and the test texts.
    """
    trainer = Trainer(family, model, params, full.eval_batches[0])
    trials = [run_trial(trainer, search, rate) for rate in family.rates]
    rate = best_rate(trials)
    trained, run_result = trainer.train(full.plan, full.head, rate)
    if not np.isfinite(run_result.losses).all():
        raise FloatingPointError(f"The loss of {family.name} is not finite at the rate {rate}.")
    adapter, head = trained["adapter"], trained["head"]
    features = trainer.features(adapter, full.eval_batches)

    def merged_features(adapter: Adapter) -> jax.Array:
        merged = trainer.lora.merge(trainer.params, dict(adapter))
        return quickstart.compute_features(functools.partial(encode, merged), full.eval_batches)

    def merged_accuracy(adapter: Adapter) -> float:
        return quickstart.accuracy(head, merged_features(adapter), full.labels)

    difference = None
    if family.mergeable:
        difference = float(jnp.abs(features - merged_features(adapter)).max())
    size = quickstart.count(jlora.partition(adapter)[0])
    return Row(
        family=family.name,
        test_accuracy=quickstart.accuracy(head, features, full.labels),
        adapter_parameters=size,
        trained_parameters=size + quickstart.count(head),
        seconds=round(run_result.seconds, 1),
        compile_seconds=round(run_result.compile_seconds, 1),
        last_loss=float(np.mean(run_result.losses[-20:])),
        merged_minus_adapted_max_abs=difference,
        learning_rate=rate,
        pattern=family.pattern,
        config=repr(family.config),
        trials=[one._asdict() for one in trials],
        figures=family.figures(adapter, merged_accuracy),
    )


HEADER = (
    f"{'family':18}{'test accuracy':>14}{'adapter':>12}{'with head':>12}{'seconds':>9}"
    f"{'merged':>10}{'rate':>9}"
)


def format_row(row: Row) -> str:
    """Returns the row as text."""
    difference, rate = row.merged_minus_adapted_max_abs, row.learning_rate
    text = (
        f"{row.family:18}{row.test_accuracy:14.3f}{row.adapter_parameters:12,}"
        f"{row.trained_parameters:12,}{row.seconds:9.0f}"
        f"{'-' if difference is None else f'{difference:.0e}':>10}"
        f"{'-' if rate is None else f'{rate:g}':>9}"
    )
    figures = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.figures.items())
    return "  ".join([text, *figures])


def command(output: pathlib.Path) -> str:
    """Returns the command, with the name of the output file only."""
    words = [output.name if word == str(output) else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks.quality.methods", *words])


def run(
    settings: Any, families: list[Family], output: pathlib.Path | None, earlier: list[Row]
) -> None:
    """Measures the families, and writes all rows with the `earlier` ones after each."""
    checkpoint = quickstart.find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    texts = quickstart.load_texts(settings.texts_per_package)
    texts = quickstart.tokenize(texts, checkpoint, settings.lengths[-1])
    encode = quickstart.compile_mean_pool(model.apply)
    frozen = functools.partial(encode, params)

    start = time.perf_counter()
    full = prepare_split(texts["train"], texts["test"], settings, frozen)
    head_seconds = time.perf_counter() - start
    held_out = np.array([is_validation(text) for text in texts["train"]["text"]])
    short = search_settings(settings)
    cut = quickstart.tokenize(texts, checkpoint, short.lengths[-1])["train"]
    fit, validation = (cut.select(np.flatnonzero(held_out == side)) for side in (False, True))
    search = prepare_split(fit, validation, short, frozen)

    test_features = quickstart.compute_features(frozen, full.eval_batches)
    frozen_accuracy = quickstart.accuracy(full.head, test_features, full.labels)
    count = quickstart.count(full.head)
    rows = [Row("frozen encoder", frozen_accuracy, 0, count, round(head_seconds, 1))]
    train_labels = np.array(texts["train"]["label"])
    majority = float(np.mean(full.labels == np.bincount(train_labels).argmax()))
    order = ["frozen encoder", *(family.name for family in FAMILIES)]

    def row_order(row: Row) -> int:
        return order.index(row.family)

    print(f"{len(train_labels):,} training texts, {len(full.labels):,} test texts")
    print(f"{len(full.plan):,} steps, most frequent package {majority:.3f}")
    print(HEADER)
    print(format_row(rows[0]), flush=True)
    rows += earlier
    for family in families:
        rows.append(measure(family, model, params, encode, search, full))
        print(format_row(rows[-1]), flush=True)
        if output:
            result = {
                "command": command(output),
                "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
                "versions": quickstart.versions(),
                "texts": {split: len(texts[split]) for split in texts},
                "steps": len(full.plan),
                "settings": {
                    **dataclasses.asdict(settings),
                    "learning_rate": "each family's own",
                    "head_learning_rate": HEAD_RATE,
                    "balance": BALANCE,
                },
                "learning_rate_chosen": {
                    "by": "least cross entropy on validation texts, taken from the training texts; "
                    "the two rates of each family were found by such trials too",
                    "training_texts": len(fit),
                    "validation_texts": len(validation),
                    "steps": len(search.plan),
                    "epochs": short.epochs,
                    "lengths": short.lengths,
                },
                "most_frequent_package": majority,
                "standard_error": math.sqrt(
                    frozen_accuracy * (1 - frozen_accuracy) / len(full.labels)
                ),
                "rows": [dataclasses.asdict(row) for row in sorted(rows, key=row_order)],
            }
            output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def main() -> None:
    """Measures the requested families."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, as a check")
    names = [family.name for family in FAMILIES]
    parser.add_argument("--families", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the other rows of that file")
    options = parser.parse_args()
    if options.append and not options.output:
        parser.error("--append requires --output, the file whose rows are kept.")
    datasets.disable_progress_bars()
    chosen = [family for family in FAMILIES if family.name in options.families]
    earlier = []
    if options.append and options.output.exists():
        kept = set(names).difference(options.families)
        rows = json.loads(options.output.read_text())["rows"]
        earlier = [Row(**row) for row in rows if row["family"] in kept]
    run(TINY if options.tiny else FULL, chosen, options.output, earlier)


if __name__ == "__main__":
    main()

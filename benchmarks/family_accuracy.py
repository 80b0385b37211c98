"""What each family learns of the quickstart's task, and with how many trained parameters.

Prints a table and writes JSON after every family. Everything is as in `examples/quickstart.py`
but the adapter, its optimizer and its learning rate. Of two rates that one is taken which has the
lower loss on a tenth of the training texts, after as many epochs on the beginnings of the others.
To see it work on a CPU in a few minutes:
`python benchmarks/family_accuracy.py --tiny`; the committed figures:
`python benchmarks/family_accuracy.py --output benchmarks/results/family_accuracy.json`.

It is one run of each with one seed, on a few hundred test texts: two families whose accuracies
differ by less than two of the standard errors that the JSON holds may as well be equal.
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
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import AdapterConfig, count_trainable_elements
from jlora.adapters.sora import SoRALeaf

Adapter = Mapping[str, Any]
Batch = Any  # The quickstart's.

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = r"layer_\d+/.*/kernel"
HEAD_RATE = 2e-3  # The same for every family.
BALANCE = 0.01  # The factor of the mixture's load-balancing loss, zero for all others.


def script(path: pathlib.Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


quickstart = script(ROOT / "examples/quickstart.py")


WHOLE = quickstart.Settings()
TINY = dataclasses.replace(quickstart.TINY, texts_per_package=6)


def searched(settings: Any) -> Any:
    """The same for the comparison of learning rates, with texts cut to the least length."""
    return dataclasses.replace(settings, lengths=settings.lengths[:1])


# --- the families --------------------------------------------------------------------------------


def adam(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam on what the family trains."""
    del steps
    return jlora.lora_optimizer(optax.adam(rate))


def adam_with(ratios: Mapping[str, float]) -> Callable[..., optax.GradientTransformation]:
    """Adam with learning rates of their own for some labels."""
    return lambda rate, steps: jlora.lora_optimizer(optax.adam(rate), lr_multipliers=ratios)


def adam_with_budget(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam under AdaLoRA's budget, two thirds of the ranks in the end."""
    return jlora.adalora_rank_allocator(
        adam(rate, steps),
        target_rank=8,
        total_steps=steps,
        warmup_steps=steps // 10,
        final_steps=steps // 4,
    )


def adam_with_threshold(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam and SoRA's proximal step, for a penalty of 0.3 on the absolute gates.

    Adam's steps are of about the learning rate whatever the gradient, so a penalty of one would
    close every gate; and gates start at one, which takes them ten times the rate to leave in time.
    """
    del steps
    optimizer = jlora.lora_optimizer(optax.adam(rate), lr_multipliers={"gate": 10})
    return optax.chain(optimizer, jlora.soft_threshold(lambda _: 10 * rate * 0.3))


def no_penalty(adapter: Adapter) -> jax.Array:
    """Nothing that a family adds to the loss."""
    del adapter
    return jnp.zeros(())


def same_base(params: Any, adapter: Adapter) -> Any:
    """The encoder as it is."""
    del adapter
    return params


def no_figures(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """Nothing that only one family has."""
    del adapter, accuracy_of
    return {}


def at_lower_ranks(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """DyLoRA's test accuracy with its first ranks alone."""
    return {
        f"test_accuracy_rank_{rank}": accuracy_of(jlora.truncate_rank(adapter, rank))
        for rank in (1, 2, 4)
    }


def pruned(adapter: Adapter, accuracy_of: Callable[[Adapter], float]) -> dict[str, float]:
    """How many ranks AdaLoRA or SoRA set to zero, and the test accuracy without them."""
    leaves = adapter.values()
    gates = [leaf.gate for leaf in leaves if isinstance(leaf, SoRALeaf)]
    gates += [leaf.s for leaf in leaves if isinstance(leaf, AdaLoRALeaf)]
    closed = jnp.concatenate([gate.ravel() for gate in gates]) == 0
    return {
        "share_of_ranks_at_zero": float(closed.mean()),
        "test_accuracy_pruned": accuracy_of(jlora.prune_ranks(adapter)),
    }


class Family(NamedTuple):
    """One row of the table.

    Attributes:
        name: What the table calls it.
        config: The rule for every weight that the pattern matches.
        rates: The learning rates that are compared.
        pattern: Of the adapted weights.
        optimizer: `(learning rate now, steps)` to the optimizer of the adapter.
        penalty: What is added to the loss.
        base: `(params, fresh adapter)` to the encoder that the adapter belongs on.
        mergeable: Whether there is a merged encoder to compare with.
        figures: `(adapter, accuracy of an adapter once merged)` to what else is reported.
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
    # On weights as small as these a fresh adapter of the default deviation does harm.
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
    """Whether learning rates are judged by a training text, one in ten: its hash tells."""
    return hashlib.sha256(text.encode()).digest()[1] < 256 // 10


class Split(NamedTuple):
    """Texts to train on and texts to judge by, and the head that training starts from."""

    plan: list[Batch]  # What training steps on, in order.
    judged: list[Batch]
    labels: np.ndarray  # Of what is judged.
    head: Any


def prepared(
    train: datasets.Dataset,
    judged: datasets.Dataset,
    settings: Any,
    encode: Callable[..., jax.Array],
) -> Split:
    """The batches of two datasets, and the head fitted on what `encode(ids, mask)` returns."""
    rng = np.random.default_rng(0)
    plan = [b for _ in range(settings.epochs) for b in quickstart.batches(train, settings, rng)]
    in_order = quickstart.batches(train, settings)
    features = quickstart.features_of(encode, in_order)
    head = quickstart.fitted_head(features, quickstart.labels_of(in_order))
    judged_batches = quickstart.batches(judged, settings)
    return Split(plan, judged_batches, quickstart.labels_of(judged_batches), head)


# --- training ------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step replaces."""

    trained: Any  # {"adapter": ..., "head": ...}
    adapter_optimizer: optax.OptState
    head_optimizer: optax.OptState


class Course(NamedTuple):
    """What training measured."""

    losses: list[float]  # nats, of each step, without penalties
    seconds: float  # of all steps, each taken at the median of its length
    compile_seconds: float


class Trainer:
    """One family on the encoder, with its compiled steps."""

    def __init__(self, family: Family, model: Any, params: Any, example: Batch) -> None:
        self.family = family
        self.lora = jlora.lora_transform(model.apply, {family.pattern: family.config})
        self.fresh = self.lora.init(jax.random.key(0), params, example.ids, example.mask)
        self.params = family.base(params, self.fresh)
        self.encode = quickstart.pooled(self.lora.apply)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def train(self, plan: list[Batch], head: Any, rate: float) -> tuple[Any, Course]:
        """The trained `{"adapter", "head"}` after a step on every batch, and how it went."""
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
        return state.trained, Course(losses, total, compiled - start)

    def _program(self, steps: int, state: State, batch: Batch) -> Callable[..., Any]:
        """The step compiled for the batch's length, once for every number of steps."""
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
        risen = jnp.asarray(
            optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)(number)
        )
        key = jax.random.fold_in(jax.random.key(1), number)

        def loss(trained: Any) -> tuple[jax.Array, jax.Array]:
            hidden, balance = self.lora.apply_with_aux_loss(
                params, trained["adapter"], batch.ids, batch.mask, dropout_key=key
            )
            features = jlora.models.mean_pool(hidden, batch.mask)
            scores = quickstart.scores_of(trained["head"], features)
            targets = jax.nn.one_hot(batch.labels, len(quickstart.PACKAGES))
            targets = optax.smooth_labels(targets, quickstart.Settings.label_smoothing)
            errors = optax.softmax_cross_entropy(scores, targets)
            error = jnp.average(errors, weights=batch.real)
            return error + BALANCE * balance + self.family.penalty(trained["adapter"]), error

        (_, error), gradient = jax.value_and_grad(loss, has_aux=True)(state.trained)
        clip = optax.clip_by_global_norm(1.0)
        clipped: Any = clip.update(gradient, clip.init(gradient))[0]
        adapter_updates, adapter_optimizer = self.family.optimizer(rate * risen, steps).update(
            clipped["adapter"], state.adapter_optimizer, state.trained["adapter"]
        )
        head_updates, head_optimizer = optax.adam(HEAD_RATE * risen).update(
            clipped["head"], state.head_optimizer
        )
        updates = {"adapter": adapter_updates, "head": head_updates}
        trained = optax.apply_updates(state.trained, updates)
        return State(trained, adapter_optimizer, head_optimizer), error

    def features(self, adapter: Adapter, batches: list[Batch]) -> jax.Array:
        """The mean hidden states (texts, width) of the adapted encoder."""
        return quickstart.features_of(functools.partial(self.encode, self.params, adapter), batches)


class Trial(NamedTuple):
    """What one learning rate came to; None where it is not finite."""

    learning_rate: float
    validation_loss: float | None  # nats
    validation_accuracy: float


def trial(trainer: Trainer, split: Split, rate: float) -> Trial:
    """What a learning rate comes to."""
    trained, _ = trainer.train(split.plan, split.head, rate)
    features = trainer.features(trained["adapter"], split.judged)
    scores = quickstart.scores_of(trained["head"], features)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, split.labels).mean()
    accuracy = quickstart.accuracy(trained["head"], features, split.labels)
    return Trial(rate, float(loss) if jnp.isfinite(loss) else None, accuracy)


def best(trials: list[Trial]) -> float:
    """The learning rate of the least loss.

    Raises:
        FloatingPointError: No loss is finite.
    """
    finite = [(t.validation_loss, t.learning_rate) for t in trials if t.validation_loss is not None]
    if not finite:
        raise FloatingPointError(f"No learning rate leads to a finite loss: {trials}.")
    return min(finite)[1]


# --- the report ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What one family came to.

    Attributes:
        adapter_parameters: How many numbers of the adapter are trained.
        trained_parameters: The same with the head.
        seconds: Of the training steps, each taken at the median of its length; compiling them and
            the search are not in it.
        last_loss: Mean training loss, in nats and with smoothed labels, of the last 20 steps.
        merged_minus_adapted_max_abs: Between the mean hidden states of the test texts; None where
            there is no merged encoder.
        learning_rate: The highest, of the adapter; it rises and falls as in the quickstart.
        trials: What it was chosen from.
        figures: What only this family has.
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
    whole: Split,
) -> Row:
    """One family: its learning rate chosen, trained on all training texts, tested.

    Args:
        family: What to train.
        model: The encoder.
        params: Its weights.
        encode: The compiled `(params, ids, mask)` to mean hidden states, without an adapter.
        search: The training texts alone, some of them to judge by.
        whole: The training texts, and the test texts to judge by.
    """
    trainer = Trainer(family, model, params, whole.judged[0])
    trials = [trial(trainer, search, rate) for rate in family.rates]
    rate = best(trials)
    trained, course = trainer.train(whole.plan, whole.head, rate)
    if not np.isfinite(course.losses).all():
        raise FloatingPointError(f"The loss of {family.name} is not finite at the rate {rate}.")
    adapter, head = trained["adapter"], trained["head"]
    features = trainer.features(adapter, whole.judged)

    def merged_features(adapter: Adapter) -> jax.Array:
        merged = trainer.lora.merge(trainer.params, dict(adapter))
        return quickstart.features_of(functools.partial(encode, merged), whole.judged)

    def merged_accuracy(adapter: Adapter) -> float:
        return quickstart.accuracy(head, merged_features(adapter), whole.labels)

    difference = None
    if family.mergeable:
        difference = float(jnp.abs(features - merged_features(adapter)).max())
    size = sum(map(count_trainable_elements, adapter.values()))
    return Row(
        family=family.name,
        test_accuracy=quickstart.accuracy(head, features, whole.labels),
        adapter_parameters=size,
        trained_parameters=size + quickstart.count(head),
        seconds=round(course.seconds, 1),
        compile_seconds=round(course.compile_seconds, 1),
        last_loss=float(np.mean(course.losses[-20:])),
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


def line(row: Row) -> str:
    """The row as text."""
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
    """How the program was called; of where it wrote, the file's name only."""
    words = [output.name if word == str(output) else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/family_accuracy.py", *words])


def run(
    settings: Any, families: list[Family], output: pathlib.Path | None, earlier: list[Row]
) -> None:
    """Measures the families, and writes what is known after each, with the `earlier` rows."""
    checkpoint = quickstart.find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    texts = quickstart.load_texts(settings.texts_per_package)
    texts = quickstart.tokenised(texts, checkpoint, settings.lengths[-1])
    encode = quickstart.pooled(model.apply)
    frozen = functools.partial(encode, params)

    start = time.perf_counter()
    whole = prepared(texts["train"], texts["test"], settings, frozen)
    head_seconds = time.perf_counter() - start
    held_out = np.array([is_validation(text) for text in texts["train"]["text"]])
    short = searched(settings)
    cut = quickstart.tokenised(texts, checkpoint, short.lengths[-1])["train"]
    fit, validation = (cut.select(np.flatnonzero(held_out == side)) for side in (False, True))
    search = prepared(fit, validation, short, frozen)

    test_features = quickstart.features_of(frozen, whole.judged)
    frozen_accuracy = quickstart.accuracy(whole.head, test_features, whole.labels)
    count = quickstart.count(whole.head)
    rows = [Row("frozen encoder", frozen_accuracy, 0, count, round(head_seconds, 1))]
    train_labels = np.array(texts["train"]["label"])
    majority = float(np.mean(whole.labels == np.bincount(train_labels).argmax()))
    order = ["frozen encoder", *(family.name for family in FAMILIES)]

    def place(row: Row) -> int:
        return order.index(row.family)

    print(f"{len(train_labels):,} training texts, {len(whole.labels):,} test texts")
    print(f"{len(whole.plan):,} steps, most frequent package {majority:.3f}")
    print(HEADER)
    print(line(rows[0]), flush=True)
    rows += earlier
    for family in families:
        rows.append(measure(family, model, params, encode, search, whole))
        print(line(rows[-1]), flush=True)
        if output:
            result = {
                "command": command(output),
                "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
                "versions": quickstart.versions(),
                "texts": {split: len(texts[split]) for split in texts},
                "steps": len(whole.plan),
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
                    frozen_accuracy * (1 - frozen_accuracy) / len(whole.labels)
                ),
                "rows": [dataclasses.asdict(row) for row in sorted(rows, key=place)],
            }
            output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def main() -> None:
    """Measures the families asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, to see it work")
    names = [family.name for family in FAMILIES]
    parser.add_argument("--families", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the other rows of that file")
    options = parser.parse_args()
    if options.append and not options.output:
        parser.error("--append needs --output: the file whose rows are kept.")
    datasets.disable_progress_bars()
    chosen = [family for family in FAMILIES if family.name in options.families]
    earlier = []
    if options.append and options.output.exists():
        kept = set(names).difference(options.families)
        rows = json.loads(options.output.read_text())["rows"]
        earlier = [Row(**row) for row in rows if row["family"] in kept]
    run(TINY if options.tiny else WHOLE, chosen, options.output, earlier)


if __name__ == "__main__":
    main()

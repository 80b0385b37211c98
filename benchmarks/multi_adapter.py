"""Many adapters in one batch beside the bare base, and several fine-tunings at once beside one.

On a CPU, in seconds: `python -m benchmarks.multi_adapter --tiny`; on one GPU:
`python -m benchmarks.multi_adapter --shape 8b --part decode --output decode_8b.json`.

`decode` is a step of one token for each row, with a full cache of keys and values; `prefill` reads
prompts and returns the logits of what follows; `train` makes optimizer steps.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.h100 import common
from benchmarks.h100.step import PROJECTIONS, decoder, parameters
from jlora import multi_lora
from jlora.models.decoder import Decoder, init_cache

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
CONFIG = jlora.LoRA(rank=common.RANK, alpha=common.ALPHA)
ATTENTION = r"layers.*attention.*kernel"
WEIGHTS = {"all": PROJECTIONS, "attention": ATTENTION}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured step.

    Attributes:
        part: "decode", "prefill" or "train".
        method: What was run.
        shape: A name in `common.SHAPES`.
        weights: Which projections are adapted: all seven of a layer, or those of attention.
        rows: Texts in the batch.
        length: Tokens of each that the step computes.
        context: Tokens that a decode step looks back at.
        distinct: How many adapters the batch has.
        step_ms: Median of `repeats_ms`.
        repeats_ms: Per step, of steps that were not waited for one by one.
        ratio: Of `step_ms` to that of what the part compares with: the bare base, or one run.
        planned_gib: Arguments, results and temporaries as XLA's compiler planned them.
    """

    part: str
    method: str
    shape: str
    weights: str
    rows: int
    length: int
    context: int
    distinct: int
    step_ms: float
    repeats_ms: list[float]
    ratio: float
    planned_gib: float


def drawn(like: Any, seed: int) -> Any:
    """An adapter like a fresh one with noise in both factors."""
    leaves, treedef = jax.tree.flatten(like)
    random = np.random.default_rng(seed)
    made = [0.01 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(treedef, made)


def filled(lora: Any, params: Any, count: int, *inputs: Any) -> multi_lora.Slots:
    """The slots of that many adapters with noise in their factors, drawn where they lie."""
    like = jax.eval_shape(lora.init, jax.random.key(0), params, *inputs)
    slots = multi_lora.empty_slots(like, count + 1, common.RANK, jnp.bfloat16)
    leaves, treedef = jax.tree.flatten(slots)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(treedef, [_noise(k, x) for k, x in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, donate_argnums=1)
def _noise(key: jax.Array, like: jax.Array) -> jax.Array:
    return 0.01 * jax.random.normal(key, like.shape, like.dtype)


def index_of(rows: int, distinct: int) -> jax.Array:
    """That many slots in turn."""
    return 1 + jnp.arange(rows) % distinct


class Measuring:
    """Times steps of one part, each beside the part's first."""

    def __init__(self, options: Any, part: str, **facts: Any) -> None:
        self._options, self._part, self._facts = options, part, facts
        self.rows: list[Row] = []

    def __call__(
        self, method: str, distinct: int, step: Callable[..., Any], *args: Any, times: int = 1
    ) -> None:
        """Times `step(*args)`, whose first argument is what it returns first, given up to it.

        Args:
            method: What is run.
            distinct: How many adapters there are.
            step: To be compiled.
            *args: Its arguments.
            times: How often the step is made for what the others do in one.
        """
        state, *rest = args
        compiled = jax.jit(step, donate_argnums=0).lower(state, *rest).compile()
        copied = jax.tree.map(jnp.copy, state)

        def advance() -> Any:
            nonlocal copied
            copied, out = compiled(copied, *rest)
            return out

        def wait() -> Any:
            return jax.block_until_ready(copied)

        options = self._options
        timing = common.timed(advance, wait, steps=options.steps, repeats=options.repeats)
        step_ms = times * timing.step_ms
        first = self.rows[0].step_ms if self.rows else step_ms
        row = Row(
            part=self._part,
            method=method,
            shape=options.shape,
            weights=options.weights,
            distinct=distinct,
            step_ms=round(step_ms, 3),
            repeats_ms=[round(times * one, 3) for one in timing.repeats_ms],
            ratio=round(step_ms / first, 3),
            planned_gib=round(common.planned_gib(compiled), 2),
            **self._facts,
        )
        self.rows.append(row)
        print(f"{row.part}: {method}: {row.step_ms:.3f} ms, {row.ratio:.3f} of the first")


def tokens_of(shape: common.Shape, rows: int, length: int) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(3), (rows, length), 0, shape.vocabulary)


def decode(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """One token for each row, whose cache is full but for that one."""
    shape, rows, context = common.SHAPES[options.shape], options.rows, options.context
    tokens = tokens_of(shape, rows, 1)
    mask = jnp.ones((rows, 1), jnp.int32)
    positions = jnp.full((rows, 1), context - 1, jnp.int32)
    cache = init_cache(model, rows, context, jnp.bfloat16)
    cache = cache._replace(
        segment_ids=cache.segment_ids.at[:, :-1].set(1), length=jnp.int32(context - 1)
    )
    axes = multi_lora.infer_batch_axes(lambda rows: init_cache(model, rows, context, jnp.bfloat16))
    lora = jlora.lora_transform(model.apply, {WEIGHTS[options.weights]: CONFIG})
    measure = Measuring(options, "decode", rows=rows, length=1, context=context)

    def again(cache: Any) -> Any:
        return cache._replace(length=jnp.int32(context - 1))

    def bare(cache: Any, params: Any) -> Any:
        logits, cache = model.apply(params, tokens, mask, positions, cache)  # type: ignore
        return again(cache), logits.max()

    def by_row(cache: Any, params: Any, slots: Any, index: Any) -> Any:
        logits, cache = multi_lora.apply_per_example(
            lora, params, slots, index, tokens, mask, positions, cache, batch_axes=(0, 0, 0, axes)
        )
        return again(cache), logits.max()

    def alike(cache: Any, params: Any, adapter: Any) -> Any:
        logits, cache = lora.apply(params, adapter, tokens, mask, positions, cache)
        return again(cache), logits.max()

    measure("bare base", 0, bare, cache, params)
    slots = filled(lora, params, max(options.distinct), tokens)
    for distinct in options.distinct:
        index = index_of(rows, distinct)
        measure("adapter by row", distinct, by_row, cache, params, slots, index)
    one = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    measure("one adapter for all", 1, alike, cache, params, jax.device_put(drawn(one, 0)))
    return measure.rows


def prefill(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """The logits of what follows each prompt."""
    shape, rows, length = common.SHAPES[options.shape], options.rows, options.prompt
    tokens = tokens_of(shape, rows, length)

    def following(params: Any, tokens: jax.Array) -> jax.Array:
        last = model.apply(params, tokens, method="hidden")[:, -1]  # type: ignore[index]
        return (last @ params["params"]["head"]).astype(jnp.float32)

    lora = jlora.lora_transform(following, {WEIGHTS[options.weights]: CONFIG})
    measure = Measuring(options, "prefill", rows=rows, length=length, context=length)

    def bare(seen: Any, params: Any) -> Any:
        return seen, following(params, tokens).max()

    def by_row(seen: Any, params: Any, slots: Any, index: Any) -> Any:
        return seen, multi_lora.apply_per_example(lora, params, slots, index, tokens).max()

    def alike(seen: Any, params: Any, adapter: Any) -> Any:
        return seen, lora.apply(params, adapter, tokens).max()

    measure("bare base", 0, bare, jnp.zeros(()), params)
    slots = filled(lora, params, max(options.distinct), tokens)
    for distinct in options.distinct:
        index = index_of(rows, distinct)
        measure("adapter by row", distinct, by_row, jnp.zeros(()), params, slots, index)
    one = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    measure("one adapter for all", 1, alike, jnp.zeros(()), params, jax.device_put(drawn(one, 0)))
    return measure.rows


def train(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """Steps of several adapters at once, beside one adapter on the same batch, and one by one."""
    shape, count, length = common.SHAPES[options.shape], options.adapters, options.prompt
    tokens = tokens_of(shape, count, length + 1)
    optimizer = optax.adam(common.LEARNING_RATE)

    def mean_loss(params: Any, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return model.apply(params, inputs, targets, method="losses").mean()  # type: ignore

    lora = jlora.lora_transform(mean_loss, {WEIGHTS[options.weights]: CONFIG})
    like = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    adapters = [jax.device_put(drawn(like, number)) for number in range(count)]
    measure = Measuring(options, "train", rows=count, length=length, context=length)

    def alone(state: Any, params: Any, tokens: jax.Array) -> Any:
        adapter, moments = state
        loss = lambda adapter: lora.apply(params, adapter, tokens)
        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(adapter, updates), moments), value

    def at_once(state: Any, params: Any, tokens: jax.Array) -> Any:
        loss = lambda adapter, own: lora.apply(params, adapter, own)
        adapters, moments, losses = multi_lora.train_in_parallel(loss, optimizer).step(
            *state, tokens
        )
        return (adapters, moments), losses.sum()

    one = (adapters[0], optimizer.init(adapters[0]))
    measure("one adapter, all rows", 1, alone, one, params, tokens)
    stacked = multi_lora.stack_adapters(adapters)
    together = (stacked, jax.vmap(optimizer.init)(stacked))
    measure(f"{count} at once, a row each", count, at_once, together, params, tokens[:, None])
    measure(f"{count} runs, a row each", count, alone, one, params, tokens[:1], times=count)
    return measure.rows


PARTS = {"decode": decode, "prefill": prefill, "train": train}


def measured(options: Any) -> Iterator[Row]:
    """All rows that were asked for."""
    shape = common.SHAPES[options.shape]
    model = decoder(shape, stacked=options.stacked, remat="nothing")
    params = parameters(model, None)
    for part in options.part:
        yield from PARTS[part](options, model, params)


def main() -> None:
    """Measures and writes."""
    parser = common.parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--weights", choices=WEIGHTS, default="all")
    parser.add_argument("--rows", type=int, default=64, help="of decode and prefill")
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill and training")
    parser.add_argument("--adapters", type=int, default=8, help="trained at once")
    parser.add_argument("--stacked", action="store_true", help="layers as one scan")
    options = parser.parse_args()
    if options.shape == "tiny":
        small = {"rows": 8, "distinct": [1, 4, 8], "context": 16, "prompt": 8, "adapters": 2}
        for name, value in small.items():
            setattr(options, name, value)
    rows = list(measured(options))
    if options.output:
        found = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "device": common.device_name(),
            "versions": common.versions(*LIBRARIES),
            "command": common.command("benchmarks.multi_adapter"),
        }
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Many adapters in one batch compared with the base, and parallel fine-tunings with one run.

On a CPU, in seconds: `python -m benchmarks.speed.multi_lora --tiny`; on one GPU:
`python -m benchmarks.speed.multi_lora --shape 8b --part decode --output decode_8b.json`.

`decode` is a step of one token per text with a full KV cache; `prefill` reads prompts and returns
the logits of the next token; `train` runs optimizer steps.
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
from benchmarks.speed import _common
from benchmarks.speed.train_step import PROJECTIONS, decoder, parameters
from jlora import multi_lora
from jlora.models import Decoder, init_cache

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
CONFIG = jlora.LoRA(rank=_common.RANK, alpha=_common.ALPHA)
ATTENTION = r"layers.*attention.*kernel"
WEIGHTS = {"all": PROJECTIONS, "attention": ATTENTION}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured step.

    Attributes:
        part: "decode", "prefill" or "train".
        method: Measured method.
        shape: Name in `_common.SHAPES`.
        weights: Adapted projections: all seven of a layer, or those of attention.
        rows: Texts in the batch.
        length: Tokens of each text that the step computes.
        context: Tokens that a decode step attends to.
        distinct: Number of adapters in the batch.
        step_ms: Median of `repeats_ms`.
        repeats_ms: Milliseconds per step of each repeat, with one wait at its end.
        ratio: Ratio of `step_ms` to that of the part's reference: the base alone, or one run.
        planned_gib: Arguments, results and temporaries in the plan of XLA's compiler.
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


def random_adapter(like: Any, seed: int) -> Any:
    """Returns an adapter with noise in both factors."""
    leaves, treedef = jax.tree.flatten(like)
    random = np.random.default_rng(seed)
    arrays = [0.01 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(treedef, arrays)


def random_slots(lora: Any, params: Any, count: int, *inputs: Any) -> multi_lora.Slots:
    """Returns slots with `count` adapters of noise, created on the device."""
    like = jax.eval_shape(lora.init, jax.random.key(0), params, *inputs)
    slots = multi_lora.empty_slots(like, count + 1, _common.RANK, jnp.bfloat16)
    leaves, treedef = jax.tree.flatten(slots)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(treedef, [_noise(k, x) for k, x in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, donate_argnums=1)
def _noise(key: jax.Array, like: jax.Array) -> jax.Array:
    return 0.01 * jax.random.normal(key, like.shape, like.dtype)


def slot_index(rows: int, distinct: int) -> jax.Array:
    """Returns the slots of the rows, (rows,), cycling through `distinct` slots."""
    return 1 + jnp.arange(rows) % distinct


class PartTimer:
    """Measures steps of one part, each relative to the part's first."""

    def __init__(self, options: Any, part: str, **facts: Any) -> None:
        self._options, self._part, self._facts = options, part, facts
        self.rows: list[Row] = []

    def __call__(
        self, method: str, distinct: int, step: Callable[..., Any], *args: Any, times: int = 1
    ) -> None:
        """Measures `step(*args)`, which returns its first argument, donated, with an output.

        Args:
            method: Name of the method.
            distinct: Number of adapters.
            step: Function to compile.
            *args: Arguments of the step.
            times: Number of steps that do the work of one step of the reference.
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
        timing = _common.time_steps(advance, wait, steps=options.steps, repeats=options.repeats)
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
            planned_gib=round(_common.planned_gib(compiled), 2),
            **self._facts,
        )
        self.rows.append(row)
        print(f"{row.part}: {method}: {row.step_ms:.3f} ms, {row.ratio:.3f} of the first")


def random_tokens(shape: _common.Shape, rows: int, length: int) -> jax.Array:
    """Returns random tokens, (rows, length)."""
    return jax.random.randint(jax.random.key(3), (rows, length), 0, shape.vocabulary)


def decode(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """Measures a step of one token per text, with a cache that is full after it."""
    shape, rows, context = _common.SHAPES[options.shape], options.rows, options.context
    tokens = random_tokens(shape, rows, 1)
    mask = jnp.ones((rows, 1), jnp.int32)
    positions = jnp.full((rows, 1), context - 1, jnp.int32)
    cache = init_cache(model, rows, context, jnp.bfloat16)
    cache = cache._replace(
        segment_ids=cache.segment_ids.at[:, :-1].set(1), length=jnp.int32(context - 1)
    )
    axes = multi_lora.infer_batch_axes(lambda rows: init_cache(model, rows, context, jnp.bfloat16))
    lora = jlora.lora_transform(model.apply, {WEIGHTS[options.weights]: CONFIG})
    measure = PartTimer(options, "decode", rows=rows, length=1, context=context)

    def rewind(cache: Any) -> Any:
        return cache._replace(length=jnp.int32(context - 1))

    def base_step(cache: Any, params: Any) -> Any:
        logits, cache = model.apply(params, tokens, mask, positions, cache)  # type: ignore
        return rewind(cache), logits.max()

    def per_row_step(cache: Any, params: Any, slots: Any, index: Any) -> Any:
        logits, cache = multi_lora.apply_per_example(
            lora, params, slots, index, tokens, mask, positions, cache, batch_axes=(0, 0, 0, axes)
        )
        return rewind(cache), logits.max()

    def one_adapter_step(cache: Any, params: Any, adapter: Any) -> Any:
        logits, cache = lora.apply(params, adapter, tokens, mask, positions, cache)
        return rewind(cache), logits.max()

    measure("bare base", 0, base_step, cache, params)
    slots = random_slots(lora, params, max(options.distinct), tokens)
    for distinct in options.distinct:
        index = slot_index(rows, distinct)
        measure("adapter by row", distinct, per_row_step, cache, params, slots, index)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    adapter = jax.device_put(random_adapter(shapes, 0))
    measure(
        "one adapter for all",
        1,
        one_adapter_step,
        cache,
        params,
        adapter,
    )
    return measure.rows


def prefill(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """Measures the logits of the token after each prompt."""
    shape, rows, length = _common.SHAPES[options.shape], options.rows, options.prompt
    tokens = random_tokens(shape, rows, length)

    def next_logits(params: Any, tokens: jax.Array) -> jax.Array:
        last = model.apply(params, tokens, method="hidden_states")[:, -1]  # type: ignore[index]
        return (last @ params["params"]["head"]).astype(jnp.float32)

    lora = jlora.lora_transform(next_logits, {WEIGHTS[options.weights]: CONFIG})
    measure = PartTimer(options, "prefill", rows=rows, length=length, context=length)

    def base_step(carry: Any, params: Any) -> Any:
        return carry, next_logits(params, tokens).max()

    def per_row_step(carry: Any, params: Any, slots: Any, index: Any) -> Any:
        return carry, multi_lora.apply_per_example(lora, params, slots, index, tokens).max()

    def one_adapter_step(carry: Any, params: Any, adapter: Any) -> Any:
        return carry, lora.apply(params, adapter, tokens).max()

    measure("bare base", 0, base_step, jnp.zeros(()), params)
    slots = random_slots(lora, params, max(options.distinct), tokens)
    for distinct in options.distinct:
        index = slot_index(rows, distinct)
        measure("adapter by row", distinct, per_row_step, jnp.zeros(()), params, slots, index)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    adapter = jax.device_put(random_adapter(shapes, 0))
    measure(
        "one adapter for all",
        1,
        one_adapter_step,
        jnp.zeros(()),
        params,
        adapter,
    )
    return measure.rows


def train(options: Any, model: Decoder, params: Any) -> Sequence[Row]:
    """Measures parallel training of several adapters, compared with one adapter and with runs."""
    shape, count, length = _common.SHAPES[options.shape], options.adapters, options.prompt
    tokens = random_tokens(shape, count, length + 1)
    optimizer = optax.adam(_common.LEARNING_RATE)

    def mean_loss(params: Any, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return model.apply(params, inputs, targets, method="losses").mean()  # type: ignore

    lora = jlora.lora_transform(mean_loss, {WEIGHTS[options.weights]: CONFIG})
    like = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    adapters = [jax.device_put(random_adapter(like, number)) for number in range(count)]
    measure = PartTimer(options, "train", rows=count, length=length, context=length)

    def one_run_step(state: Any, params: Any, tokens: jax.Array) -> Any:
        adapter, moments = state
        loss = lambda adapter: lora.apply(params, adapter, tokens)
        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(adapter, updates), moments), value

    def parallel_step(state: Any, params: Any, tokens: jax.Array) -> Any:
        loss = lambda adapter, batch: lora.apply(params, adapter, batch)
        adapters, moments, losses = multi_lora.train_in_parallel(loss, optimizer).step(
            *state, tokens
        )
        return (adapters, moments), losses.sum()

    one = (adapters[0], optimizer.init(adapters[0]))
    measure("one adapter, all rows", 1, one_run_step, one, params, tokens)
    stacked = multi_lora.stack_adapters(adapters)
    parallel = (stacked, jax.vmap(optimizer.init)(stacked))
    measure(f"{count} at once, a row each", count, parallel_step, parallel, params, tokens[:, None])
    measure(f"{count} runs, a row each", count, one_run_step, one, params, tokens[:1], times=count)
    return measure.rows


PARTS = {"decode": decode, "prefill": prefill, "train": train}


def measure(options: Any) -> Iterator[Row]:
    """Yields the rows of the requested parts."""
    shape = _common.SHAPES[options.shape]
    model = decoder(shape, stacked=options.stacked, remat_policy="none")
    params = parameters(model, None)
    for part in options.part:
        yield from PARTS[part](options, model, params)


def main() -> None:
    """Measures and writes."""
    parser = _common.build_parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--weights", choices=WEIGHTS, default="all")
    parser.add_argument("--rows", type=int, default=64, help="texts of decode and prefill")
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
    rows = list(measure(options))
    if options.output:
        found = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "device": _common.device_name(),
            "versions": _common.versions(*LIBRARIES),
            "command": _common.format_command("benchmarks.speed.multi_lora"),
        }
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

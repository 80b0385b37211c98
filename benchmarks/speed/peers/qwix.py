"""Training step of Qwix's LoRA on a plain Linen decoder.

Requires qwix==0.1.8 besides JAX and Flax. On a CPU, in seconds:
`python -m benchmarks.speed.peers.qwix --tiny`; on one GPU:
`python -m benchmarks.speed.peers.qwix --shape 1b --output qwix_1b.json`.
"""

# The environment of jlora's lint does not have qwix.
# pyright resolves the name qwix to this file.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import traverse_util

from benchmarks.speed import _common, step_cost

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "qwix")
Tree = dict[str, jax.Array]


def adapted(shape: _common.Shape) -> Any:
    """Returns the decoder of step_cost.py with Qwix's LoRA on its projections."""
    decoder = step_cost.Decoder(
        step_cost.Shape(
            layers=shape.layers,
            width=shape.width,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            vocabulary=shape.vocabulary,
            batch=shape.batch,
            length=shape.length,
            dtype="bfloat16",
        ),
        attention="cudnn" if jax.default_backend() == "gpu" else None,
    )
    names = "|".join(shape.projections)
    provider = qwix.LoraProvider(
        module_path=f".*/({names})", rank=_common.RANK, alpha=float(_common.ALPHA)
    )
    return qwix.apply_lora_to_model(decoder, provider)


def parameters(model: Any, tokens: jax.Array) -> tuple[Tree, Tree]:
    """Returns random parameters by path, `(trained, frozen)`, in the types of Qwix."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    named: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    keys = jax.random.split(jax.random.key(1), len(named))
    values = {
        name: _value(key, name.rsplit("/", 1)[1], leaf.shape, leaf.dtype)
        for key, (name, leaf) in zip(keys, named.items(), strict=True)
    }
    trained = {name: value for name, value in values.items() if "_lora_" in name}
    return trained, {name: values[name] for name in values.keys() - trained.keys()}


# Compiled once per kind and shape, of which a decoder has few; its `init` would be one program with
# all layers.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _value(key: jax.Array, kind: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if kind == "scale":
        return jnp.ones(shape, dtype)
    if kind == "kernel_lora_b":
        return jnp.zeros(shape, dtype)
    return 0.02 * jax.random.normal(key, shape, dtype)


def training_step(model: Any) -> tuple[Callable[..., Any], Callable[[Tree], Any]]:
    """Returns a step and its optimizer's `init`.

    The step takes `(trained, moments, frozen, tokens)` and returns `(loss, trained, moments)`.
    """
    optimizer = optax.adam(_common.LEARNING_RATE)

    def step(trained: Tree, moments: Any, frozen: Tree, tokens: jax.Array) -> Any:
        def loss(trained: Tree) -> jax.Array:
            params = traverse_util.unflatten_dict({**trained, **frozen}, sep="/")
            return step_cost.cross_entropy(model.apply({"params": params}, tokens), tokens)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, moments = optimizer.update(gradient, moments)
        return value, optax.apply_updates(trained, updates), moments

    return step, optimizer.init


def measure(options: Any) -> _common.Row:
    """Returns the row of Qwix's step."""
    shape = _common.SHAPES[options.shape]
    tokens = jax.random.randint(jax.random.key(2), (shape.batch, shape.length), 0, shape.vocabulary)
    model = adapted(shape)
    trained, frozen = parameters(model, tokens)
    size = sum(leaf.size for leaf in trained.values())
    _common.check_trainable_size(size, shape)
    details = {
        "adapter_dtype": str(next(iter(trained.values())).dtype),
        "base_gib": sum(leaf.nbytes for leaf in frozen.values()) / 2**30,
    }
    step, init = training_step(model)
    state = trained, init(trained)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, frozen, tokens).compile()

    def advance() -> jax.Array:
        nonlocal state
        loss, *rest = compiled(*state, frozen, tokens)
        state = tuple(rest)
        return loss

    timing = _common.time_steps(
        advance,
        lambda: jax.block_until_ready(state),
        steps=options.steps,
        repeats=options.repeats,
    )
    return _common.make_row(
        "qwix",
        options,
        timing,
        script="benchmarks.speed.peers.qwix",
        libraries=LIBRARIES,
        peak_gib=_common.peak_gib(jax.devices()[0]),
        planned_gib=_common.planned_gib(compiled),
        trained=size,
        details=details,
    )


def main() -> None:
    """Measures and writes."""
    options = _common.build_parser(__doc__).parse_args()
    _common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()

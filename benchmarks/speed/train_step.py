"""Training step of jlora's decoder with LoRA, with a quantized base, or without an adapter.

On a CPU, in seconds: `python -m benchmarks.speed.train_step --tiny`; on one GPU:
`python -m benchmarks.speed.train_step --shape 1b --output lora_1b.json`. `--method floor` is the
same step without an adapter: the gradient reaches every activation down to the first layer's norm.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

import jlora
from benchmarks.speed import _common
from jlora.kernels import plain_products
from jlora.models import Decoder, model_from_config

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
SCHEMES: Mapping[str, Any] = {"nf4": jlora.NF4(), "int8": jlora.Int8(), "none": None}
PROJECTIONS = r"layers.*kernel"
FLOOR = "params/layers_0/attention_norm/scale"


def decoder(shape: _common.Shape, *, stacked: bool, remat_policy: Any) -> Decoder:
    """Returns the decoder, which computes in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "config.json"
        config.write_text(json.dumps(_common.llama_config(shape)))
        model = model_from_config(folder, scan_layers=stacked, remat_policy=remat_policy)
    return model.clone(dtype=jnp.bfloat16)


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns the "/"-joined paths, the leaves and the structure; quantized weights are leaves."""
    is_leaf = lambda leaf: isinstance(leaf, jlora.QArray)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return paths, [leaf for _, leaf in pairs], treedef


def parameters(model: Decoder, scheme: Any) -> Any:
    """Returns random bfloat16 parameters with quantized projections.

    At most one matrix exists in bfloat16 before its quantization.
    """
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), token))
    paths, leaves, treedef = flatten_with_paths(shapes)
    keys = jax.random.split(jax.random.key(1), len(paths))
    weights = [
        _random_matrices(key, leaf.shape, scheme if path.endswith("kernel") else None)
        if len(leaf.shape) > 1 and not path.endswith("scale")
        else jnp.ones(leaf.shape, jnp.bfloat16)
        for key, path, leaf in zip(keys, paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, weights)


def random_matrices(key: jax.Array, shape: tuple[int, ...], scheme: Any) -> Any:
    """Returns a random bfloat16 matrix, or a stack of them, quantized if there is a scheme."""

    def matrix(key: jax.Array) -> Any:
        weight = 0.02 * jax.random.normal(key, shape[-2:], jnp.bfloat16)
        return weight if scheme is None else jlora.quantize({"w": weight}, {"w": scheme})["w"]

    if len(shape) < 3:
        return matrix(key)
    return jax.lax.map(matrix, jax.random.split(key, shape[0]))


# Compiled once for each shape; a decoder has few.
_random_matrices = jax.jit(random_matrices, static_argnums=(1, 2))


def training_step(
    model: Decoder, method: str, chunks: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns a step, and the function from parameters and tokens to its `(trained, moments)`.

    The step takes `(trained, moments, params, tokens)` and returns `(loss, trained, moments)`.
    """
    # The floor's steps must change a norm's scale, which is one in bfloat16.
    optimizer = optax.adam(_common.LEARNING_RATE if method == "lora" else 1e-2)

    def mean_loss(params: Any, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return model.apply(params, inputs, targets, method="losses", chunks=chunks).mean()  # type: ignore

    config = jlora.LoRA(rank=_common.RANK, alpha=_common.ALPHA)
    lora = jlora.lora_transform(mean_loss, {PROJECTIONS: config})

    def loss(trained: Any, params: Any, tokens: jax.Array) -> jax.Array:
        if method == "lora":
            return lora.apply(params, trained, tokens)
        paths, leaves, treedef = flatten_with_paths(params)
        leaves = [
            trained.astype(leaf.dtype) if path == FLOOR else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return mean_loss(jax.tree.unflatten(treedef, leaves), tokens)

    def step(trained: Any, moments: Any, params: Any, tokens: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(trained, params, tokens)
        updates, moments = optimizer.update(gradient, moments)
        return value, optax.apply_updates(trained, updates), moments

    def init(params: Any, tokens: jax.Array) -> Any:
        if method == "lora":
            trained = lora.init(jax.random.key(2), params, tokens)
        else:
            paths, leaves, _ = flatten_with_paths(params)
            # In float32, where a step exceeds the rounding.
            trained = leaves[paths.index(FLOOR)].astype(jnp.float32)
        return trained, optimizer.init(trained)

    return step, init


def measure(options: Any) -> _common.Row:
    """Returns the row of jlora's step."""
    shape = _common.SHAPES[options.shape]
    batch, length = options.batch or shape.batch, options.length or shape.length
    tokens = jax.random.randint(jax.random.key(3), (batch, length + 1), 0, shape.vocabulary)
    model = decoder(shape, stacked=options.stacked, remat_policy=options.remat_policy)
    params = parameters(model, SCHEMES[options.quantize])
    step, init = training_step(model, options.method, options.chunks)
    state = init(params, tokens)
    size = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    if options.method == "lora":
        _common.check_trainable_size(size, shape)
    with plain_products() if options.plain else contextlib.nullcontext():
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*state, params, tokens)
    details = {
        "adapter_dtype": "float32",
        "base_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30,
        "kernels": "mosaic_gpu" in lowered.as_text(),
    }
    compiled = lowered.compile()

    def advance() -> jax.Array:
        nonlocal state
        loss, *rest = compiled(*state, params, tokens)
        state = tuple(rest)
        return loss

    def wait() -> Any:
        return jax.block_until_ready(state)

    timing = _common.time_steps(advance, wait, steps=options.steps, repeats=options.repeats)
    if options.trace:
        options.trace.write_text(json.dumps(profile_kernels(advance, wait), indent=1) + "\n")
    return _common.make_row(
        format_method(options),
        options,
        timing,
        script="benchmarks.speed.train_step",
        libraries=LIBRARIES,
        peak_gib=_common.peak_gib(jax.devices()[0]),
        planned_gib=_common.planned_gib(compiled),
        trained=size,
        details=details,
        batch=batch,
        length=length,
    )


def format_method(options: Any) -> str:
    """Returns the method's name in the row."""
    name = "floor" if options.method == "floor" else "jlora"
    extras = [options.quantize] * (options.quantize != "none")
    extras += ["layers in a stack"] * options.stacked
    extras += [f"remat_policy={options.remat_policy}"] * (options.remat_policy != "none")
    extras += ["plain products"] * options.plain
    return ", ".join([name, *extras])


def profile_kernels(
    advance: Callable[[], Any], wait: Callable[[], Any], steps: int = 3
) -> list[Any]:
    """Returns the GPU kernels of a step as `[ms, times, name]`, the longest first."""
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                advance()
            wait()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                if "GPU" in plane.name and "Stream" in line.name:
                    for event in line.events:
                        totals[event.name][0] += event.duration_ns / 1e6 / steps
                        totals[event.name][1] += 1 / steps
    rows = [[round(ms, 4), round(times, 2), name] for name, (ms, times) in totals.items()]
    return sorted(rows, reverse=True)


def main() -> None:
    """Measures and writes."""
    parser = _common.build_parser(__doc__)
    parser.add_argument("--method", choices=["lora", "floor"], default="lora")
    parser.add_argument("--quantize", choices=SCHEMES, default="none", help="of the projections")
    parser.add_argument("--stacked", action="store_true", help="layers as one scan")
    parser.add_argument("--plain", action="store_true", help="without jlora's kernels")
    policies = ("none", "save_projections", "full")
    parser.add_argument("--remat-policy", choices=policies, default="none")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of a text for the head")
    parser.add_argument("--batch", type=int, help="sequences per step; default: the shape's")
    parser.add_argument("--length", type=int, help="tokens per sequence; default: the shape's")
    parser.add_argument("--trace", type=pathlib.Path, help="JSON file of the GPU's kernels")
    options = parser.parse_args()
    if options.method == "floor" and (options.stacked or options.quantize != "none"):
        parser.error("--method floor requires separate layers without quantization.")
    _common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()

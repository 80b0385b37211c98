"""Cost of one training step: full fine-tuning, merging inside the loss, and `lora.apply`.

Prints a table and writes JSON. On a CPU:
`python -m benchmarks.speed.step_cost --shape tiny`; on one GPU:
`python -m benchmarks.speed.step_cost --shape 1b --output benchmarks/results/step_cost.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jlora

Implementation = Literal["xla", "cudnn"] | None


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a Llama-like decoder and its training batch."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    dtype: str


SHAPES = {
    "tiny": Shape(2, 128, 384, 4, 2, 512, 4, 64, "float32"),
    "1b": Shape(16, 2048, 8192, 32, 8, 32_000, 8, 1024, "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement of a compiled step.

    Attributes:
        method: Name of the method.
        step_ms: Median of the repeats, with a wait after every step.
        tokens_per_s: Tokens of the batch per second at the median.
        tflop: XLA's count for the step lowered for a CPU with plain attention: a GPU's compiler
            moves products into library calls, which its count omits.
        peak_mib: Arguments, results and temporaries in the compiler's plan.
        trained: Number of trainable parameters.
    """

    method: str
    step_ms: float
    tokens_per_s: float
    tflop: float
    peak_mib: float
    trained: int


class Layer(nn.Module):
    """One pre-norm block with grouped-query attention, rotary positions and SwiGLU."""

    shape: Shape
    attention: Implementation

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        s = self.shape
        dtype, head = jnp.dtype(s.dtype), s.width // s.heads

        def dense(features: Any, name: str, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features, axis, use_bias=False, dtype=dtype, param_dtype=dtype, name=name
            )

        y = nn.RMSNorm(dtype=dtype, name="attention_norm")(x)
        q = rotate(dense((s.heads, head), "q")(y), *rope)
        k = rotate(dense((s.kv_heads, head), "k")(y), *rope)
        v = dense((s.kv_heads, head), "v")(y)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        x = x + dense(s.width, "o", (-2, -1))(mixed)
        y = nn.RMSNorm(dtype=dtype, name="mlp_norm")(x)
        y = nn.silu(dense(s.hidden, "gate")(y)) * dense(s.hidden, "up")(y)
        return x + dense(s.width, "down")(y), None


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns heads (batch, length, heads, dim) with rotary positions applied."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, -1).astype(x.dtype)


class Decoder(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocabulary).

    Attributes:
        shape: Shape of the layers.
        attention: Implementation of attention.
        scan_layers: True for stacked layers in a scan.
    """

    shape: Shape
    attention: Implementation = None
    scan_layers: bool = False

    def setup(self) -> None:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        self.embed = nn.Embed(s.vocabulary, s.width, dtype=dtype, param_dtype=dtype)
        if self.scan_layers:
            in_axes: Any = nn.broadcast
            stack: Any = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=s.layers,
            )
            self.blocks = [stack(s, self.attention)]
        else:
            self.blocks = [Layer(s, self.attention) for _ in range(s.layers)]
        self.norm = nn.RMSNorm(dtype=dtype)
        self.head = nn.Dense(s.vocabulary, use_bias=False, dtype=dtype, param_dtype=dtype)

    def body(self, x: jax.Array) -> jax.Array:
        half = self.shape.width // self.shape.heads // 2
        angles = jnp.outer(jnp.arange(x.shape[1]), 10_000 ** (-jnp.arange(half) / half))
        rope = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
        for block in self.blocks:
            x, _ = block(x, rope)
        return self.head(self.norm(x))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.body(self.embed(tokens))


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean over positions, each predicting the next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


class Methods:
    """Training methods, each as `(step, state)` with `step(params, state, tokens) -> state`."""

    def __init__(
        self,
        shape: Shape,
        config: Any,
        *,
        params: Any = None,
        abstract: bool = False,
        scan_layers: bool = False,
    ) -> None:
        on_gpu = jax.default_backend() == "gpu" and shape.dtype == "bfloat16"
        self.model = Decoder(shape, "cudnn" if on_gpu and not abstract else None, scan_layers)
        self._make = jax.eval_shape if abstract else lambda fn, *args: jax.jit(fn)(*args)
        draw = lambda key: jax.random.randint(key, (shape.batch, shape.length), 0, shape.vocabulary)
        self.tokens = self._make(draw, jax.random.key(1))
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.tokens)
        self.params = self._make(_random, shapes) if params is None else params
        rules = {r"/(q|k|v|o|gate|up|down)/kernel": config}
        self.lora = jlora.lora_transform(self.model.apply, rules)
        init = lambda params: self.lora.init(jax.random.key(2), params, self.tokens)
        self.adapter = jax.eval_shape(init, self.params)
        if not abstract:  # The values do not change the time, and random ones take long.
            full = lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype)
            self.adapter = jax.tree.map(full, self.adapter)
        self.optimizer = optax.adam(1e-4)

    def logits(self, params: Any, *inputs: Any, **kwargs: Any) -> jax.Array:
        """Returns the decoder's logits, whose type Flax widens with mutable collections."""
        result: Any = self.model.apply(params, *inputs, **kwargs)
        return result

    def forward(self) -> tuple[Callable[..., Any], Any]:
        """Computes the loss only."""
        return lambda p, s, t: cross_entropy(self.logits(p, t), t), jnp.zeros(())

    def floor(self) -> tuple[Callable[..., Any], Any]:
        """Forward pass and gradient of activations, a lower bound for methods that train layers."""

        def step(params: Any, rows: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = lambda x: self.logits(params, x, method="body")
            return jax.grad(lambda x: cross_entropy(logits(x), tokens))(rows)

        table = self.params["params"]["embed"]["embedding"]
        return step, self._make(lambda table, tokens: table[tokens], table, self.tokens)

    def full(self) -> tuple[Callable[..., Any], Any]:
        """Trains every weight by plain SGD, without optimizer state."""

        def step(_: Any, params: Any, tokens: jax.Array) -> Any:
            loss = lambda p: cross_entropy(self.logits(p, tokens), tokens)
            gradient = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 1e-4 * g.astype(p.dtype), params, gradient)

        return step, self._make(_copy, self.params)

    def merge(self) -> tuple[Callable[..., Any], Any]:
        """Trains LoRA by adding the update to the weight inside the loss."""
        return self._train(lambda p, a, t: self.logits(jlora.merge(p, a), t))

    def apply(self) -> tuple[Callable[..., Any], Any]:
        """Trains LoRA by `lora.apply`."""
        return self._train(self.lora.apply)

    def _train(self, forward: Callable[..., jax.Array]) -> tuple[Callable[..., Any], Any]:
        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            trained, rest, moments = state
            adapter = lambda trained: jlora.combine(trained, rest)
            loss = lambda t: cross_entropy(forward(params, adapter(t), tokens), tokens)
            updates, moments = self.optimizer.update(jax.grad(loss)(trained), moments)
            return optax.apply_updates(trained, updates), rest, moments

        trained, rest = jlora.partition(self._make(_copy, self.adapter))
        return step, (trained, rest, self._make(self.optimizer.init, trained))


def _copy(tree: Any) -> Any:
    """Returns copies of the arrays, which a step may donate."""
    return jax.tree.map(jnp.copy, tree)


def _random(shapes: Any) -> Any:
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [
        jnp.ones(leaf.shape, leaf.dtype)
        if "norm" in jax.tree_util.keystr(path)
        else (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        for (path, leaf), key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, values)


def measure(name: str, methods: Methods, abstract: Methods, repeats: int) -> Row:
    """Measures one method's step, compiled once and run `repeats` times after two warm-ups.

    Args:
        name: Name of a method of `Methods`.
        methods: Methods with arrays, to run.
        abstract: Methods with shapes, to count operations.
        repeats: Number of measured steps.
    """
    step, state = getattr(methods, name)()
    donated = (1,) if name in ("full", "merge", "apply") else ()
    lowered = jax.jit(step, donate_argnums=donated).lower(methods.params, state, methods.tokens)
    compiled = lowered.compile()
    counted_step, counted_state = getattr(abstract, name)()
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = jax.jit(counted_step).lower(abstract.params, counted_state, abstract.tokens)
    trained = jax.tree.leaves(methods.params if name == "full" else state[0] if donated else ())
    times_ms = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(methods.params, state, methods.tokens))
        times_ms.append(1e3 * (time.perf_counter() - start))
        state = result if donated else state
    memory: Any = compiled.memory_analysis()
    counts: Any = on_cpu.cost_analysis() or {}
    planned = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    median_ms = statistics.median(times_ms[2:])
    return Row(
        method=name,
        step_ms=round(median_ms, 2),
        tokens_per_s=round(1e3 * methods.tokens.size / median_ms),
        tflop=round(counts.get("flops", 0) / 1e12, 4),
        peak_mib=round(planned / 2**20, 1),
        trained=sum(array.size for array in trained),
    )


def command(output: pathlib.Path) -> str:
    """Returns the command, with the name of the output file only."""
    words = [output.name if word == str(output) else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks.speed.step_cost", *words])


def table(rows: list[Row]) -> str:
    """Returns the rows as text, with the ratio of each step to the floor's."""
    floor_ms = next((row.step_ms for row in rows if row.method == "floor"), None)
    lines = [f"{'method':8} {'step ms':>9} {'/ floor':>8} {'tokens/s':>9} {'TFLOP':>9} {'MiB':>9}"]
    for row in rows:
        ratio = f"{row.step_ms / floor_ms:.2f}" if floor_ms else "-"
        lines.append(
            f"{row.method:8} {row.step_ms:9.2f} {ratio:>8} {row.tokens_per_s:9,} "
            f"{row.tflop:9.4f} {row.peak_mib:9,.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures the requested methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--methods", nargs="+", default=["forward", "floor", "full", "merge", "apply"]
    )
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    options = parser.parse_args()
    config = jlora.LoRA(rank=options.rank, alpha=options.rank)
    methods = Methods(SHAPES[options.shape], config)
    abstract = Methods(SHAPES[options.shape], config, abstract=True)
    rows = [measure(name, methods, abstract, options.repeats) for name in options.methods]
    print(f"{options.shape}: {SHAPES[options.shape]}, rank {options.rank}")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(table(rows))
    if options.output:
        result = {
            "command": command(options.output),
            "device": jax.devices()[0].device_kind,
            "versions": {
                "python": sys.version.split()[0],
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
            },
            "shape": dataclasses.asdict(SHAPES[options.shape]),
            "rank": options.rank,
            "repeats": options.repeats,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

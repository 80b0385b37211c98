"""CPU seconds that jlora takes to trace a deep model, beside the model alone.

python -m benchmarks.speed.tracing --layers 50 100 200 --output benchmarks/results/tracing.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora

WIDTH, HIDDEN, TOKENS, RANK = 64, 160, 16, 8
# Query, key, value, output; gate, up and down.
SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
    **dict.fromkeys(("gate", "up"), (WIDTH, HIDDEN)),
    "down": (HIDDEN, WIDTH),
}


def forward(params: Any, x: jax.Array) -> jax.Array:
    """A decoder's products, layer by layer, with attention over the tokens."""
    for layer in params:
        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        scores = jax.nn.softmax((h @ layer["q"]) @ (h @ layer["k"]).T)
        x = x + (scores @ (h @ layer["v"])) @ layer["o"]
        x = x + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return x


def cpu_seconds(fn: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.process_time()
        fn()
        times.append(time.process_time() - start)
    return min(times)


def measure(layers: int, repeats: int) -> dict[str, float]:
    """CPU seconds of each function for a model of so many layers."""
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    params = [weights] * layers
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    lora = jlora.lora_transform(forward, jlora.LoRA(rank=RANK, alpha=RANK))
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapter = jax.eval_shape(lora.init, key, params, x)

    def loss(adapter: Any, params: Any, x: Any) -> Any:
        return lora.apply(params, adapter, x).sum()

    calls = {
        "base": lambda: jax.make_jaxpr(forward)(params, x),
        "base_gradient": lambda: jax.make_jaxpr(jax.grad(lambda p, x: forward(p, x).sum()))(
            params, x
        ),
        "apply": lambda: jax.make_jaxpr(lora.apply)(params, adapter, x),
        "gradient": lambda: jax.make_jaxpr(jax.grad(loss))(adapter, params, x),
        "init": lambda: jax.eval_shape(lora.init, key, params, x),
        "explain": lambda: lora.explain(params, x),
        "merge": lambda: jax.make_jaxpr(lora.merge)(params, adapter),
    }
    return {"layers": layers, **{name: cpu_seconds(fn, repeats) for name, fn in calls.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        rows.append(measure(layers, options.repeats))
        print(", ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    if options.output:
        facts = {"jax": jax.__version__, "python": platform.python_version()}
        command = (
            f"python -m benchmarks.speed.tracing --layers {' '.join(map(str, options.layers))}"
        )
        result = {"command": command, "device": "cpu, one core", "versions": facts, "rows": rows}
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()

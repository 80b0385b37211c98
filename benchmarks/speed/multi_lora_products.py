"""Products of each row of a batch with the factors of its adapter, compared with `x W` alone.

On a CPU: `python -m benchmarks.speed.multi_lora_products --tiny`; on a GPU:
`python -m benchmarks.speed.multi_lora_products --output multi_products.json`.

Every variant computes `x W + (x A_i) B_i` for rows sorted by adapter, for eight weights in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import _common

WEIGHTS = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a product: `rows` texts of `tokens` each, from `fan_in` to `fan_out`."""

    rows: int
    tokens: int
    fan_in: int
    fan_out: int
    slots: int
    distinct: int


SIZES = [
    *(Size(64, 1, *sides, 65, n) for sides in ((4096, 4096), (4096, 14336)) for n in (64, 8, 1)),
    Size(512, 1, 4096, 4096, 9, 8),
    Size(64, 512, 4096, 4096, 65, 64),
]
TINY = [Size(4, 1, 64, 96, 5, 4)]


def entries(x: Any, a: Any, b: Any, index: Any, sizes: Any) -> Any:
    """Multiplies elementwise and sums, which a compiler fuses with the gather of the factors."""
    del sizes
    wide = jnp.float32
    t = (x[:, :, None].astype(wide) * a[index][:, None].astype(wide)).sum(-1).astype(x.dtype)
    return (t[..., None].astype(wide) * b[index][:, None].astype(wide)).sum(2).astype(x.dtype)


def looked_up(x: Any, a: Any, b: Any, index: Any, sizes: Any) -> Any:
    """Gathers the factors and multiplies matrices."""
    del sizes
    t = jnp.einsum("btd,brd->btr", x, a[index])
    return jnp.einsum("btr,brk->btk", t, b[index])


def segments(x: Any, a: Any, b: Any, index: Any, sizes: Any) -> Any:
    """Multiplies the rows of each adapter by `ragged_dot`."""
    del index
    flat, counts = x.reshape(-1, x.shape[-1]), sizes * x.shape[1]
    t = jax.lax.ragged_dot(flat, jnp.swapaxes(a, 1, 2), counts)
    return jax.lax.ragged_dot(t, b, counts).reshape(*x.shape[:2], -1)


def all_slots(x: Any, a: Any, b: Any, index: Any, sizes: Any) -> Any:
    """Multiplies with the factors of all slots, and masks those of other adapters."""
    del sizes
    t = jnp.einsum("btd,srd->btsr", x, a)
    own = (index[:, None] == jnp.arange(len(a)))[:, None, :, None]
    return jnp.einsum("btsr,srk->btk", jnp.where(own, t, 0), b)


VARIANTS: dict[str, Callable[..., Any] | None] = {
    "base alone": None,
    "entries": entries,
    "looked up": looked_up,
    "segments": segments,
    "all slots": all_slots,
}


def measure_us(size: Size, name: str, steps: int, repeats: int) -> float:
    """Returns the microseconds of one product."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + 3 * WEIGHTS))

    def random_array(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape, jnp.bfloat16)

    x = random_array(size.rows, size.tokens, size.fan_in)
    layers = [
        (
            random_array(size.fan_in, size.fan_out),
            random_array(size.slots, _common.RANK, size.fan_in),
            random_array(size.slots, _common.RANK, size.fan_out),
        )
        for _ in range(WEIGHTS)
    ]
    index = jnp.sort(1 + jnp.arange(size.rows) % size.distinct)
    sizes = jnp.bincount(index, length=size.slots)
    variant = VARIANTS[name]

    @jax.jit
    def run(x: Any, layers: Any, index: Any, sizes: Any) -> Any:
        for w, a, b in layers:
            y = x @ w
            if variant is not None:
                y = jnp.where((index == 0)[:, None, None], y, y + variant(x, a, b, index, sizes))
            x = x + (1e-6 * y.sum(-1, keepdims=True)).astype(
                x.dtype
            )  # The next product depends on it.
        return x

    compiled = run.lower(x, layers, index, sizes).compile()
    out = compiled(x, layers, index, sizes).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            out = compiled(x, layers, index, sizes)
        out.block_until_ready()
        seconds.append((time.perf_counter() - start) / steps)
    return round(1e6 * statistics.median(seconds) / WEIGHTS, 1)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    rows = []
    for size in TINY if options.tiny else SIZES:
        found = {name: measure_us(size, name, options.steps, options.repeats) for name in VARIANTS}
        rows.append({**dataclasses.asdict(size), "us": found})
        print(size, found, flush=True)
    if options.output:
        result = {
            "rows": rows,
            "device": _common.device_name(),
            "versions": _common.versions("jax", "jaxlib"),
            "command": _common.format_command("benchmarks.speed.multi_lora_products"),
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

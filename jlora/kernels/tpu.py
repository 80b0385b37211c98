"""`x W + T B` in one pass over the result, on TPUs.

XLA makes the update a product of its own that reads the base's result and writes it anew. Here it
is where the sum over tiles starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_TILE = 1024  # Rows and columns of the result that are made at a time, at most.
_STEP = 512  # Of the sum.


def fits(rows: int, contracted: int, columns: int, rank: int, dtype: Any) -> bool:
    """Whether a product of these sizes is one that `product` makes."""
    whole = not (rows % 256 or columns % 256 or contracted % 256)
    some = min(rows, contracted, columns, rank) > 0
    return dtype == jnp.bfloat16 and whole and some and rank <= 128


def product(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    turned: bool,
    interpret: bool = False,
) -> jax.Array:
    """`x W + t b` (m, n) of what `jlora.kernels.hopper.product` takes, in the same types.

    With `interpret` JAX runs the kernel step by step, on whatever device there is.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.tpu as tpu

    (m, k), n, rank = x.shape, b.shape[1], t.shape[1]
    high, wide, deep = _tile(m, _TILE), _tile(n, _TILE), _tile(k, _STEP)
    w_block = (wide, deep) if turned else (deep, wide)

    def kernel(x: Any, w: Any, t: Any, b: Any, out: Any, total: Any) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _start() -> None:
            total[...] = jnp.dot(t[...], b[...], preferred_element_type=jnp.float32)

        dimensions = ((1,), (1 if turned else 0,)), ((), ())
        total[...] += jax.lax.dot_general(
            x[...], w[...], dimensions, preferred_element_type=jnp.float32
        )

        @pl.when(step == pl.num_programs(2) - 1)
        def _store() -> None:
            out[...] = total[...].astype(out.dtype)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(m // high, n // wide, k // deep),
        in_specs=[
            pl.BlockSpec((high, deep), lambda i, j, s: (i, s)),
            pl.BlockSpec(w_block, lambda i, j, s: (j, s) if turned else (s, j)),
            pl.BlockSpec((high, rank), lambda i, j, s: (i, 0)),
            pl.BlockSpec((rank, wide), lambda i, j, s: (0, j)),
        ],
        out_specs=pl.BlockSpec((high, wide), lambda i, j, s: (i, j)),
        scratch_shapes=[tpu.VMEM((high, wide), jnp.float32)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )
    return call(x, w, t, b)


def _tile(length: int, most: int) -> int:
    """The largest part of a length, no larger than `most`, that divides it."""
    for size in (1024, 512, 256):
        if size <= most and length % size == 0:
            return size
    raise ValueError(f"A length of {length} is no multiple of 256, as this kernel's tiles are.")

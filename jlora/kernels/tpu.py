"""`x W + T B` in one pass over the result, on TPUs.

XLA makes the update a product of its own that reads the base's result and writes it anew. Here it
is where the sum over tiles starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_MAX_OUT_TILE = 1024  # Rows and columns of the result that are made at a time, at most.

_MAX_CONTRACTION_TILE = 512  # Of the sum.


def fits_tpu_tiles(m: int, k: int, n: int, rank: int, dtype: Any) -> bool:
    """Whether a product of these sizes is one that `tpu_matmul_add` makes."""
    whole = not (m % 256 or n % 256 or k % 256)
    some = min(m, k, n, rank) > 0
    return dtype == jnp.bfloat16 and whole and some and rank <= 128


def tpu_matmul_add(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    transpose_rhs: bool,
    interpret: bool = False,
) -> jax.Array:
    """`x W + t b` (m, n) of what `jlora.kernels.hopper.product` takes, in the same types.

    With `interpret` JAX runs the kernel step by step, on whatever device there is.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.tpu as tpu

    (m, k), n, rank = x.shape, b.shape[1], t.shape[1]
    high, wide, deep = (
        _largest_tile(m, _MAX_OUT_TILE),
        _largest_tile(n, _MAX_OUT_TILE),
        _largest_tile(k, _MAX_CONTRACTION_TILE),
    )
    w_block = (wide, deep) if transpose_rhs else (deep, wide)

    def kernel(x: Any, w: Any, t: Any, b: Any, out: Any, total: Any) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _start() -> None:
            total[...] = jnp.dot(t[...], b[...], preferred_element_type=jnp.float32)

        dimensions = ((1,), (1 if transpose_rhs else 0,)), ((), ())
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
            pl.BlockSpec(w_block, lambda i, j, s: (j, s) if transpose_rhs else (s, j)),
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


def _largest_tile(length: int, max_size: int) -> int:
    """The largest part of a length, no larger than `max_size`, that divides it."""
    for size in (1024, 512, 256):
        if size <= max_size and length % size == 0:
            return size
    raise ValueError(f"A length of {length} is no multiple of 256, as this kernel's tiles are.")

"""Pallas kernel for TPUs: `x W + T B` in one pass over the result.

XLA computes the update as a separate product, which reads the result of the base product and writes
it again. Here the sum over tiles starts with the update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_MAX_OUT_TILE = 1024  # Maximum of rows and of columns per tile of the result.

_MAX_CONTRACTION_TILE = 512  # Maximum length of the contraction per step.


def fits_tpu_tiles(m: int, k: int, n: int, rank: int) -> bool:
    """Whether `tpu_matmul_add` supports bfloat16 products of these sizes."""
    is_divisible = not (m % 256 or n % 256 or k % 256)
    is_nonempty = min(m, k, n, rank) > 0
    return is_divisible and is_nonempty and rank <= 128


def tpu_matmul_add(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    transpose_rhs: bool,
    interpret: bool = False,
) -> jax.Array:
    """Computes `x W + t b` (m, n) in bfloat16 with float32 accumulation.

    Args:
        x: Activation, (m, k).
        w: Base weight, (k, n), or (n, k) if `transpose_rhs`.
        t: Activation times `A`, (m, rank).
        b: Factor `B`, (rank, n).
        transpose_rhs: Whether the contracted axis of `w` is its last.
        interpret: Whether Pallas interprets the kernel, on any device.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.tpu as tpu

    (m, k), n, rank = x.shape, b.shape[1], t.shape[1]
    tile_m, tile_n, tile_k = (
        _largest_tile(m, _MAX_OUT_TILE),
        _largest_tile(n, _MAX_OUT_TILE),
        _largest_tile(k, _MAX_CONTRACTION_TILE),
    )
    w_block = (tile_n, tile_k) if transpose_rhs else (tile_k, tile_n)

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
        grid=(m // tile_m, n // tile_n, k // tile_k),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda i, j, s: (i, s)),
            pl.BlockSpec(w_block, lambda i, j, s: (j, s) if transpose_rhs else (s, j)),
            pl.BlockSpec((tile_m, rank), lambda i, j, s: (i, 0)),
            pl.BlockSpec((rank, tile_n), lambda i, j, s: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda i, j, s: (i, j)),
        scratch_shapes=[tpu.VMEM((tile_m, tile_n), jnp.float32)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )
    return call(x, w, t, b)


def _largest_tile(length: int, max_size: int) -> int:
    """Returns the largest tile size up to `max_size` that divides a length."""
    for size in (1024, 512, 256):
        if size <= max_size and length % size == 0:
            return size
    raise ValueError(
        f"length={length} must be a multiple of 256, the smallest tile of this kernel."
    )
